-- complete.lua: what Tab offers in a session: session variables, table fields, tensor methods, commands, names after ?,
-- and file names inside strings. Looks, never calls.
local program = require "lolcats.program"
local lexer = require "lolcats.lexer"
local complete = {}

local function is_tensor(v)
  local bridge = package.loaded["lolcats.core.ffi"]
  return bridge ~= nil and bridge.is_tensor(v)
end

-- Every string key that v answers to.
local function keys_of(v, put)
  if is_tensor(v) then
    local bridge = package.loaded["lolcats.core.ffi"]
    for name in pairs(bridge.methods) do put(name, "method") end
    for name in pairs(bridge.fields) do put(name, "field") end
    return
  end
  if type(v) == "string" then v = string end
  local seen = {}
  while type(v) == "table" and not seen[v] do
    seen[v] = true
    for k, x in next, v do
      if type(k) == "string" then put(k, type(x) == "function" and "method" or "field") end
    end
    local meta = getmetatable(v)
    for k in pairs(type(meta) == "table" and rawget(meta, "__names") or {}) do put(k, "method") end
    v = type(meta) == "table" and rawget(meta, "__index") or nil
  end
end

-- Reads v[key] without raising.
local function read(v, key)
  local ok, value = pcall(function() return v[key] end)
  if ok then return value end
end

-- The value of a chain such as `m.layers[1].self_attn`; nil when it holds a call or an unknown name.
local function value_of(chain, env)
  local name = chain:match("^[%a_][%w_]*")
  if not name then return nil end
  local v = rawget(env, name)
  if v == nil then v = name == "lc" and package.loaded["lolcats"] or rawget(_G, name) end
  local i = #name + 1
  while i <= #chain and v ~= nil do
    local field = chain:match("^%.([%a_][%w_]*)", i)
    local index = chain:match("^%[(%-?%d+)%]", i)
    local quoted = chain:match('^%["([^"]*)"%]', i)
    if field then
      v, i = read(v, field), i + 1 + #field
    elseif index then
      v, i = read(v, tonumber(index)), i + 2 + #index
    elseif quoted then
      v, i = read(v, quoted), i + 4 + #quoted
    else
      return nil
    end
  end
  return v
end

local function with_prefix(prefix)
  local out, seen = {}, {}
  return out, function(name)
    if name:sub(1, #prefix) == prefix and not seen[name] and (prefix ~= "" or not name:match("^_")) then
      seen[name] = true
      out[#out + 1] = name
    end
  end
end

local function files(prefix)
  local folder, name = prefix:match("^(.*/)([^/]*)$")
  folder, name = folder or "", name or prefix
  local path = folder == "" and "." or folder:gsub("^~/", (os.getenv("HOME") or "~") .. "/")
  local out, put = with_prefix(name)
  for _, entry in ipairs(program.list_dir(path) or {}) do
    if name ~= "" or entry:sub(1, 1) ~= "." then put(entry) end
  end
  return out, name
end

-- Candidates for the end of `text`, and the part of it that they replace.
function complete.candidates(text, env)
  local tokens = lexer.tokens(text)
  local last = tokens[#tokens]
  if last and last.kind == "string" and last.open and last.first > 0 then
    return files((last.text:gsub("^[\"']", "")))
  end
  local command = text:match("^%s*:(%w*)$")
  if command then
    local out, put = with_prefix(command)
    for _, name in ipairs {"help", "time", "mem", "who", "source", "load", "trace", "quit"} do put(name) end
    return out, command
  end
  local file = text:match("^%s*:load%s+(%S*)$")
  if file then return files(file) end
  local asked = text:match("^%s*%?%s*([%w_]*)$") or text:match("^%s*:help%s+([%w_]*)$")
  if asked then
    local out, put = with_prefix(asked)
    for _, name in ipairs(require("lolcats.help").names()) do put(name) end
    return out, asked
  end
  local word = text:match("[%a_]?[%w_]*$")
  local before = text:sub(1, #text - #word)
  local sign = before:match("[%.:]$")
  if sign and not before:match("%.%.$") then
    local chain = before:sub(1, -2):match("([%a_][%w_%.%[%]\"%-]*)$")
    local v = chain and value_of(chain, env)
    local out, put = with_prefix(word)
    keys_of(v, function(name, kind)
      if sign == "." or kind == "method" then put(name) end
    end)
    return out, word
  end
  local out, put = with_prefix(word)
  for name in pairs(env) do if type(name) == "string" then put(name) end end
  for name in pairs(_G) do put(name) end
  for _, name in ipairs(lexer.keywords) do put(name) end
  put("lc")
  return out, word
end

-- For the line editor: the text to insert (what all candidates share), and the candidates when there are several.
function complete.line(text, env)
  local list, word = complete.candidates(text, env)
  if #list == 0 then return "" end
  table.sort(list)
  local shared = list[1]
  for _, name in ipairs(list) do
    while name:sub(1, #shared) ~= shared do shared = shared:sub(1, -2) end
  end
  local insert = shared:sub(#word + 1)
  if #list == 1 then return insert end
  return insert, list
end

return complete
