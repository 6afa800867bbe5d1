-- structure.lua: keeps the house in order: which layer may include or require which (the rules below), how long a file
-- may be, that each opens by saying what it owns, and that the public header is what Lua's parser reads, with a symbol
-- behind every function. Run in the project's root.
local t = dofile "tests/lua/harness.lua"

local function list(command)
  local pipe = assert(io.popen(command))
  local out = {}
  for line in pipe:lines() do out[#out + 1] = line end
  pipe:close()
  return out
end

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

local files = list("find runtime kernels lua recipes examples tests -type f | grep -E '[.](c|h|cu|cuh|lua|def)$' | sort")
if #files == 0 or not io.open "runtime/lolcats.h" then
  io.stdout:write("skipped: not run in the project's root\n")
  os.exit(77)
end

local problems = {}
local function problem(path, line, fmt, ...)
  problems[#problems + 1] = ("%s:%d: "):format(path, line) .. fmt:format(...)
end

local function report(name)
  t.test(name, function()
    local text = table.concat(problems, "\n")
    problems = {}
    t.ok(text == "", text)
  end)
end

local function each_line(path, f)
  local n = 0
  for line in (read(path) .. "\n"):gmatch("([^\n]*)\n") do
    n = n + 1
    f(line, n)
  end
end

-- "runtime/io/file.h" for `#include "io/file.h"` or "../io/file.h" written in `from`; nil for what is not ours.
local known = {}
for _, path in ipairs(files) do known[path] = true end
local function resolve(from, name)
  local folder = from:match("^(.*)/")
  local path = folder .. "/" .. name
  repeat
    local n
    path, n = path:gsub("[^/]+/%.%./", "", 1)
  until n == 0
  for _, candidate in ipairs {path, "runtime/" .. name, "kernels/" .. name, "tests/cuda_emulator/" .. name} do
    if known[candidate] then return candidate end
  end
end

---- C: who may include whom ----------------------------------------------------------------------------------------------

-- The first row whose pattern fits a file holds for it: what of ours it may include.
local layers = {
  {"^runtime/program/", {"^runtime/program/", "^runtime/lolcats%.h$"}},
  {"^runtime/lolcats%.h$", {}},
  {"^runtime/core/", {"^runtime/core/", "^runtime/lolcats%.h$", "^runtime/ops%.def$", "^kernels/kernel%.h$",
    "^kernels/dtype%.h$", "^kernels/philox%.h$", "^kernels/abi%.h$"}},
  {"^runtime/ops/", {"^runtime/ops/", "^runtime/core/", "^runtime/lolcats%.h$", "^runtime/ops%.def$",
    "^kernels/kernel%.h$"}},
  {"^runtime/io/", {"^runtime/io/", "^runtime/core/", "^runtime/lolcats%.h$", "^kernels/quant%.h$",
    "^kernels/dtype%.h$"}},
  {"^runtime/text/", {"^runtime/text/", "^runtime/core/", "^runtime/io/", "^runtime/lolcats%.h$"}},
  {"^kernels/cuda/device%.cuh$", {"^kernels/", "^tests/cuda_emulator/emulated%.h$"}}, -- where tests run it without a GPU
  {"^kernels/", {"^kernels/", "^runtime/ops%.def$"}}, -- the op table is data
}

local function is_c(path) return path:match("%.[ch]$") or path:match("%.cuh?$") end

for _, path in ipairs(files) do
  local allowed
  for _, row in ipairs(layers) do
    if path:find(row[1]) and is_c(path) then
      allowed = row[2]
      break
    end
  end
  if allowed then
    each_line(path, function(line, n)
      local name = line:match('^%s*#%s*include%s*"([^"]+)"')
      local target = name and resolve(path, name)
      if target then
        local ok = false
        for _, pattern in ipairs(allowed) do ok = ok or target:find(pattern) ~= nil end
        if not ok then problem(path, n, "includes %s, which is not its layer's to see", target) end
      elseif name then
        problem(path, n, "includes \"%s\", which is not in the tree", name)
      end
      local system = line:match("^%s*#%s*include%s*<([^>]+)>")
      local lua = system and (system:match("^lua") or system == "lauxlib.h")
      if lua and not path:find("^runtime/program/") then
        problem(path, n, "includes <%s>; only runtime/program knows Lua", system)
      end
    end)
  end
end
report("no layer of C is crossed")

-- Libraries never end the process, and C never prints: it returns a status with a message.
for _, path in ipairs(files) do
  if path:find("^runtime/") and not path:find("^runtime/program/") or path:find("^kernels/") then
    if is_c(path) then
      each_line(path, function(line, n)
        local code = line:gsub("/%*.-%*/", ""):gsub("//.*", ""):gsub('"[^"]*"', "")
        for _, call in ipairs {"abort", "exit", "printf"} do
          if not code:match("^%s*%*") and code:match("%f[%w_]" .. call .. "%s*%(") then
            problem(path, n, "ends or prints where it must return a status: %s", line:match("^%s*(.-)%s*$"))
          end
        end
      end)
    end
  end
end
report("no abort, exit or printf in the libraries")

---- Lua: who may require whom ------------------------------------------------------------------------------------------------

for _, path in ipairs(files) do
  if path:match("%.lua$") and not path:find("^tests/") then
    local core, library = path:find("^lua/lolcats/core/"), path:find("^lua/lolcats/")
    each_line(path, function(line, n)
      if line:match("^%s*%-%-") then return end
      for name in line:gmatch("%f[%w_]require%s*%(?%s*[\"']([%w_%.]+)[\"']") do
        if name == "ffi" and not core then
          problem(path, n, "requires ffi; only lua/lolcats/core does")
        elseif not library and name:match("^lolcats%.core%.") then
          problem(path, n, "requires %s; recipes and examples use the library above the core", name)
        elseif core and name:match("^lolcats%.") and not (name:match("^lolcats%.core%.") or name == "lolcats.header") then
          problem(path, n, "requires %s; the core knows nothing above it", name)
        end
      end
      if not library and line:match("debug%.getregistry") then problem(path, n, "reaches into the registry") end
    end)
  end
end
report("no layer of Lua is crossed")

---- files ------------------------------------------------------------------------------------------------------------------------

for _, path in ipairs(files) do
  local n = -1 -- what follows the last newline is no line
  each_line(path, function() n = n + 1 end)
  if n > 800 then problem(path, n, "%d lines; a file has at most 800", n) end
end
report("no file is too long")

for _, path in ipairs(files) do
  local first = read(path):gsub("^#![^\n]*\n", ""):match("^([^\n]*)") or ""
  if not (first:match("^/%*") or first:match("^%-%-")) then problem(path, 1, "does not open by saying what it owns") end
end
report("each file says what it owns")

---- the public header ------------------------------------------------------------------------------------------------------------

t.test("every function of the public header is in the program", function()
  local header = require "lolcats.header"
  t.ok(header == read("runtime/lolcats.h"):match("/%*<ffi>%*/(.-)/%*</ffi>%*/"),
    "the program was built from another lolcats.h")
  local ffi = require "ffi"
  pcall(ffi.cdef, header) -- once more is allowed, were it not parsed yet
  local text, n, missing = header:gsub("/%*.-%*/", ""), 0, {}
  for name in text:gmatch("(lc_[%w_]+)%s*%(") do
    n = n + 1
    if not pcall(function() return ffi.C[name] end) then missing[#missing + 1] = name end
  end
  for name in text:gmatch("extern%s+[%w_%s]-(lc_[%w_]+);") do
    if not pcall(function() return ffi.C[name] end) then missing[#missing + 1] = name end
  end
  t.ok(n > 50, "only " .. n .. " functions were seen")
  t.eq(missing, {})
end)

t.test("the header keeps to what Lua's parser reads", function()
  local header = require("lolcats.header"):gsub("/%*.-%*/", "")
  t.ok(not header:find("\n%s*#"), "a macro stands between the marks")
  t.ok(not header:find("%(%s*%*"), "a function pointer stands between the marks")
  for result, name, params in header:gmatch("([%w_ %*]-)(lc_[%w_]+)%s*(%b())") do
    local _, commas = params:gsub(",", "")
    t.ok(commas < 8, name .. " has more than 8 parameters")
    t.ok(not result:find("int64"), name .. " returns a 64-bit integer")
    for _, struct in ipairs {"lc_handle", "lc_args"} do
      t.ok(not params:find(struct .. "%s+[%w_]+[,%)]"), name .. " takes a struct by value")
    end
  end
end)

t.finish()
