-- doctor.lua: what was found on this machine: processor, libraries, devices and why not.
local lc = require "lolcats"

lc.args {"Says what was found on this machine: processor, vector width, libraries, devices and why not, memory, caches."}
lc.doctor()
