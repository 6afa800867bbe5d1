-- recipe.lua: lc.recipe("distill"): one recipe as a function for another, which calls it with its own defaults. The file is run
-- with the word "recipe" as its argument and returns the function. It is looked for beside the script, then among the program's
-- recipes; its text goes into the run folder too.
local lc = require "lolcats"
local files = require "lolcats.files"
local cli = require "lolcats.cli"
local program = require "lolcats.program"

local M = {}

local function find(name)
    local script = cli.script
    local beside = script and script.file and script.file:match "^(.*)/[^/]*$"
    if beside and files.is_file(beside .. "/" .. name .. ".lua") then
        local path = beside .. "/" .. name .. ".lua"
        return files.read(path), path
    end
    local path = "recipes/" .. name .. ".lua"
    return program.source(path), path
end

function M.load(name)
    local text, path = find(name)
    if not text then lc.fail("there is no recipe '%s'", tostring(name)) end
    local chunk, why = loadstring(text, "@" .. path)
    if not chunk then lc.fail("%s", why) end
    local f = chunk "recipe"
    if type(f) ~= "function" then lc.fail("%s is no recipe for others: it returned no function", path) end
    if cli.script then
        cli.script.parts = cli.script.parts or {}
        table.insert(cli.script.parts, { name = name .. ".lua", text = text })
    end
    return f
end

return M
