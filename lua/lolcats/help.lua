-- help.lua: what a name means, for lc.help, ?name in a session and `lolcats help NAME`. Ops come from the op table;
-- functions from the comment above them in their Lua source. Nothing is written twice.
local program = require "lolcats.program"
local cli = require "lolcats.cli"
local help = {}

local overview = [[
lolcats: tensors, gradients and language models in Lua.

  x = lc.randn(4, 6)          a tensor; positions count from 1, negatives from the end
  x:softmax(-1):sum(-1)       every op is a method; x + y, x * 2, x:matmul(y)
  lc.help "softmax"           what an op or a function does; in a session also ?softmax
  m = lc.load "smollm2"       a model; m:generate("Once upon a time", {max_new = 40})

lolcats --help lists the recipes; lolcats RECIPE --help their arguments.]]

local function op_rows()
  local ok, ops = pcall(require, "lolcats.core.ops")
  return ok and ops or {list = {}, by_name = {}}
end

local function has(op, flag)
  local flags = op.has or op.flags
  return type(flags) == "table" and flags[flag] or false
end

local kinds = {
  T = "tensor", A = "tensor of any dtype", I = "tensor of integers", L = "list of tensors", f = "number", i = "integer",
  b = "boolean", d = "dim", D = "dims", S = "shape", F = "number or 0-dim tensor",
  N = "integer or 0-dim tensor", s = "string",
}

local function op_text(op)
  local out = {op.usage or (op.name .. "  " .. op.signature), "  " .. op.doc .. "."}
  local args = {}
  for _, p in ipairs(op.params or {}) do
    local kind = p.names and table.concat(p.names, " | ") or kinds[p.kind] or p.kind
    args[#args + 1] = ("    %-12s %s%s"):format(p.name, kind, p.optional and ", may be nil" or "")
  end
  if #args > 1 then out[#out + 1] = table.concat(args, "\n") end
  local notes = {}
  notes[#notes + 1] = "gradient: " .. ((has(op, "nondiff") or has(op, "nograd")) and "no" or "yes")
  if has(op, "inplace") then notes[#notes + 1] = "changes its first tensor" end
  if has(op, "view") then notes[#notes + 1] = "shares memory with its input" end
  if has(op, "random") then notes[#notes + 1] = "draws random numbers" end
  out[#out + 1] = "  " .. table.concat(notes, "; ")
  return table.concat(out, "\n")
end

local sources = {}
local function lines_of(source)
  if sources[source] then return sources[source] end
  local path = source:match("^@(.*)")
  local text = path and program.source(path)
  if not text and path then
    local file = io.open(path, "rb")
    if file then
      text = file:read("*a")
      file:close()
    end
  end
  local lines = {}
  for line in ((text or "") .. "\n"):gmatch("([^\n]*)\n") do lines[#lines + 1] = line end
  sources[source] = lines
  return lines
end

-- The comment block right above line `at`.
local function comment_above(lines, at)
  local first = at
  while first > 1 and lines[first - 1]:match("^%s*%-%-") do first = first - 1 end
  local out = {}
  for i = first, at - 1 do
    local text = lines[i]:gsub("^%s*%-+%s?", "")
    if text:match("%-%-%-%-$") or text:match("^%s*$") and #out == 0 then out = {} else out[#out + 1] = "  " .. text end
  end
  return table.concat(out, "\n")
end

-- The comment that a file opens with.
local function opening(text)
  local out = {}
  for line in text:gmatch("([^\n]*)\n") do
    local comment = line:match("^%-%-+%s?(.*)")
    if not comment then break end
    out[#out + 1] = "  " .. comment
  end
  return table.concat(out, "\n")
end

-- The signature line and the comment of a Lua function.
local function function_text(name, f)
  local info = debug.getinfo(f, "S")
  if info.what == "C" then return name .. ": a built-in function" end
  local lines = lines_of(info.source)
  local head = lines[info.linedefined] or ""
  local params = head:match("function%s*[%w_%.:]*%s*(%b())") or "(...)"
  local comment = comment_above(lines, info.linedefined)
  local place = ("  %s:%d"):format(info.source:gsub("^[@=]", ""), info.linedefined)
  return name .. params .. "\n" .. (comment ~= "" and comment .. "\n" or "") .. place
end

local function module_text(name, t)
  local names = {}
  for k, v in pairs(t) do
    if type(k) == "string" and not k:match("^_") then names[#names + 1] = k .. (type(v) == "table" and "." or "") end
  end
  table.sort(names)
  local doc = rawget(t, "doc") or rawget(t, "__doc")
  return name .. ":" .. (type(doc) == "string" and " " .. doc or "") .. "\n  " .. table.concat(names, "  ")
end

-- "lc.nn.linear" or "nn.linear" -> the value, or nil.
local function look_up(name, env)
  local value = env
  for part in name:gmatch("[%w_]+") do
    if value == nil then return nil end
    local ok, inner = pcall(function() return value[part] end)
    value = ok and inner or nil
  end
  return value
end

function help.names()
  local names, seen = {}, {}
  local function put(name)
    if not seen[name] then
      seen[name] = true
      names[#names + 1] = name
    end
  end
  for name, op in pairs(op_rows().by_name) do
    if not has(op, "internal") then put(name) end
  end
  local ok, lc = pcall(require, "lolcats")
  for name in pairs(ok and lc or {}) do
    if type(name) == "string" then put(name) end
  end
  for name in pairs(ok and getmetatable(lc).__names or {}) do put(name) end
  return names
end

-- The text for a name (a string), or for a function or table itself; without one, an overview. `env` is where names are
-- looked up besides lc.
function help.text(name, env)
  if name == nil or name == "" then return overview end
  if type(name) == "function" then return function_text("function", name) end
  if type(name) == "table" then return module_text("table", name) end
  name = tostring(name):match("^%s*(.-)%s*$"):gsub("%(.*%)$", "")
  local short = name:gsub("^lc%.", ""):gsub("^x[:%.]", "")
  local op = op_rows().by_name[short]
  if op and not has(op, "internal") then return op_text(op) end
  local ok, lc = pcall(require, "lolcats")
  local value
  if ok then value = look_up(short, lc) end
  if value == nil then
    local good, bridge = pcall(require, "lolcats.core.ffi")
    value = good and bridge.methods and bridge.methods[short]
  end
  if not value and env then value = look_up(name, env) end
  if type(value) == "function" then return function_text(name, value) end
  if type(value) == "table" then
    local doc = rawget(value, "doc")
    return type(doc) == "string" and name .. "\n  " .. doc or module_text(name, value)
  end
  if value then return name .. ": " .. type(value) end
  local recipe = program.source("recipes/" .. short .. ".lua")
  if recipe then return ("%s is a recipe: lolcats %s --help\n%s"):format(short, short, opening(recipe)) end
  local near = cli.suggest(short, help.names())
  return ("nothing is known of '%s'%s"):format(name, near and ("; did you mean '%s'?"):format(near) or "")
end

-- lc.help(name): prints what a function or an op does.
function help.show(name)
  io.stdout:write(help.text(name), "\n")
end

return help
