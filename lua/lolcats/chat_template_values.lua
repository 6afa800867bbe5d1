--- Values of chat templates: what Jinja's operators, attributes, tests and functions do to strings, numbers, lists,
-- mappings, None and undefined. Strings count in characters (UTF-8). Numbers are Lua's, but a float that is whole (1.0)
-- is an object of its own, since it is written otherwise than 1.

local core = require "lolcats.core.text"
local files = require "lolcats.files"
local M = {}

M.null = setmetatable({}, {__tostring = function() return "None" end})
local null = M.null

local Undefined, Namespace, Loop, Float = {}, {}, {}, {}
local marks = setmetatable({}, {__mode = "k"}) -- table -> "list", "tuple", or the list of a mapping's keys in order

function M.fail(line, message) error(("chat template, line %d: %s"):format(line or 0, message), 0) end
local fail = M.fail

function M.undefined(name) return setmetatable({name = name}, Undefined) end
local undefined = M.undefined

function M.is_undefined(v) return getmetatable(v) == Undefined end
local is_undefined = M.is_undefined

function M.is_namespace(v) return getmetatable(v) == Namespace end

--- Marks a table as a list, which matters when it is empty.
function M.list(t)
  marks[t] = "list"
  return t
end

--- A tuple is a list that is written with parentheses.
function M.tuple(t)
  marks[t] = "tuple"
  return t
end

local function is_tuple(v) return marks[v] == "tuple" end

--- A number that Python would have as a float.
function M.float(v)
  if v ~= math.floor(v) or math.abs(v) >= 1e16 then return v end
  return setmetatable({value = v}, Float)
end

local function is_float(v) return getmetatable(v) == Float or (type(v) == "number" and v ~= math.floor(v)) end

--- The plain Lua number of a number, and of a boolean; nil for anything else.
local function number_of(v)
  if type(v) == "number" then return v end
  if type(v) == "boolean" then return v and 1 or 0 end
  return getmetatable(v) == Float and v.value or nil
end
M.number_of = number_of

--- Marks a table as a mapping; `order` lists its keys as they should be walked and written.
function M.object(t, order)
  marks[t] = order or {}
  return t
end

local function is_list(v)
  if type(v) ~= "table" or v == null then return false end
  local class = getmetatable(v)
  if class == Undefined or class == Namespace or class == Loop or class == Float then return false end
  local mark = marks[v]
  if mark then return mark == "list" or mark == "tuple" end
  return v[1] ~= nil or next(v) == nil
end

local function is_dict(v)
  if type(v) ~= "table" or v == null or is_list(v) then return false end
  local class = getmetatable(v)
  return class ~= Undefined and class ~= Namespace and class ~= Loop and class ~= Float
end

--- A value as it comes from outside: JSON libraries' nulls become None.
function M.incoming(v)
  local kind = type(v)
  if kind == "userdata" or (kind == "cdata" and v == nil) or rawequal(v, files.null) then return null end
  return v
end
local incoming = M.incoming

local function type_name(v)
  if v == null then return "None" end
  if is_undefined(v) then return ("'%s', which is undefined"):format(tostring(v.name)) end
  if is_list(v) then return is_tuple(v) and "a tuple" or "a list" end
  if getmetatable(v) == Float then return "a number" end
  if type(v) == "table" then return "a mapping" end
  return "a " .. type(v)
end

-- Text ----------------------------------------------------------------------------------------------------------------

function M.utf8_char(c)
  if c < 0x80 then return string.char(c) end
  if c < 0x800 then return string.char(0xC0 + math.floor(c / 64), 0x80 + c % 64) end
  return string.char(0xE0 + math.floor(c / 4096), 0x80 + math.floor(c / 64) % 64, 0x80 + c % 64)
end

local function characters(s)
  local out = {}
  for c in s:gmatch("[%z\1-\127\194-\255][\128-\191]*") do out[#out + 1] = c end
  return out
end

local function length_of(s)
  if not s:find("[\128-\255]") then return #s end
  return #characters(s)
end

local wide_space = {}
for c in ("\194\133 \194\160 \225\154\128 \226\128\168 \226\128\169 \226\128\175 \226\129\159 \227\128\128")
    :gmatch("[^ ]+") do
  wide_space[c] = true
end
for i = 0x80, 0x8A do wide_space["\226\128" .. string.char(i)] = true end

function M.strip_left(s)
  while true do
    local rest = s:gsub("^[\t-\r\28-\32]+", "")
    local wide = wide_space[rest:sub(1, 2)] and 2 or wide_space[rest:sub(1, 3)] and 3
    if not wide then return rest end
    s = rest:sub(wide + 1)
  end
end

function M.strip_right(s)
  while true do
    local stop = #s
    while stop > 0 and s:find("^[\t-\r\28-\32]", stop) do stop = stop - 1 end
    local wide = wide_space[s:sub(stop - 1, stop)] and 2 or wide_space[s:sub(math.max(stop - 2, 1), stop)] and 3
    if not wide then return s:sub(1, stop) end
    s = s:sub(1, stop - wide)
  end
end

-- Python's strip: white space, or the characters of `chars`.
local function strip(s, chars, left, right)
  if chars == nil or chars == null then
    if left then s = M.strip_left(s) end
    return right and M.strip_right(s) or s
  end
  local set, list = {}, characters(s)
  for _, c in ipairs(characters(chars)) do set[c] = true end
  local from, to = 1, #list
  while left and from <= to and set[list[from]] do from = from + 1 end
  while right and to >= from and set[list[to]] do to = to - 1 end
  return table.concat(list, "", from, to)
end

local function number_text(v)
  if v ~= v then return "nan" end
  if v == math.huge then return "inf" elseif v == -math.huge then return "-inf" end
  if v == math.floor(v) and math.abs(v) < 1e16 then return ("%d"):format(v) end
  for digits = 15, 17 do
    local text = ("%." .. digits .. "g"):format(v)
    if tonumber(text) == v then return text end
  end
end

local function plain_find(s, what, from) return s:find(what, from, true) end

local function replace_text(s, old, new, count)
  if old == "" then
    local out = characters(s)
    for i = 1, math.min(#out, count or #out) do out[i] = new .. out[i] end
    if not count or count > #out then out[#out + 1] = new end
    return table.concat(out)
  end
  local out, at = {}, 1
  while not count or count > 0 do
    local a, b = plain_find(s, old, at)
    if not a then break end
    out[#out + 1] = s:sub(at, a - 1) .. new
    at, count = b + 1, count and count - 1
  end
  return table.concat(out) .. s:sub(at)
end

local function split(s, separator, most)
  local out, at = {}, 1
  most = most and most >= 0 and most or math.huge
  if separator == nil or separator == null then
    s = M.strip_left(s)
    while s ~= "" do
      local word = #out < most and s:match("^[^\t-\r\28-\32]+")
      out[#out + 1] = word or M.strip_right(s)
      s = word and M.strip_left(s:sub(#word + 1)) or ""
    end
    return M.list(out)
  end
  while #out < most do
    local a, b = plain_find(s, separator, at)
    if not a then break end
    out[#out + 1] = s:sub(at, a - 1)
    at = b + 1
  end
  out[#out + 1] = s:sub(at)
  return M.list(out)
end

local function split_from_right(s, separator, most)
  local all = split(s, separator)
  if separator == nil or separator == null or not most or most < 0 then return all end
  while #all > most + 1 do all[1] = table.remove(all, 1) .. separator .. all[1] end
  return all
end

local function split_lines(s)
  local out = {}
  s = s:gsub("\r\n", "\n"):gsub("[\r\11\12\28-\30]", "\n")
  s = s:gsub("\194\133", "\n"):gsub("\226\128[\168\169]", "\n")
  for line, stop in s:gmatch("([^\n]*)(\n?)") do
    if line ~= "" or stop ~= "" then out[#out + 1] = line end
  end
  return M.list(out)
end

local function upper(s) return core.case(s, "u") end
local function lower(s) return core.case(s, "l") end
local function title(s) return core.case(s, "t") end
local function capitalize(s) return core.case(s, "c") end

-- Truth, equality, text of a value ------------------------------------------------------------------------------------

function M.truthy(v)
  if v == nil or v == false or v == null or v == "" or v == 0 or is_undefined(v) then return false end
  if is_list(v) then return v[1] ~= nil end
  if is_dict(v) then return next(v) ~= nil end
  return number_of(v) ~= 0
end
local truthy = M.truthy

local function equal(a, b)
  a, b = incoming(a), incoming(b)
  if a == b then return true end
  if number_of(a) and number_of(b) then return number_of(a) == number_of(b) end
  if is_undefined(a) and is_undefined(b) then return true end
  if is_list(a) ~= is_list(b) or is_tuple(a) ~= is_tuple(b) or is_dict(a) ~= is_dict(b) then return false end
  if not (is_list(a) or is_dict(a)) then return false end
  for k, v in pairs(a) do if not equal(v, b[k]) then return false end end
  for k in pairs(b) do if a[k] == nil then return false end end
  return true
end

--- A mapping's keys: in the order that it was marked with, the rest sorted.
local function keys_of(t)
  local out, seen, rest = {}, {}, {}
  local order = type(marks[t]) == "table" and marks[t] or {}
  for _, key in ipairs(order) do
    if t[key] ~= nil and not seen[key] then out[#out + 1], seen[key] = key, true end
  end
  for key in pairs(t) do if not seen[key] then rest[#rest + 1] = key end end
  table.sort(rest, function(a, b) return tostring(a) < tostring(b) end)
  for _, key in ipairs(rest) do out[#out + 1] = key end
  return out
end

local function repr(v)
  v = incoming(v)
  if type(v) == "string" then
    local quote = v:find("'", 1, true) and not v:find('"', 1, true) and '"' or "'"
    local body = v:gsub("\\", "\\\\"):gsub("\n", "\\n"):gsub("\r", "\\r"):gsub("\t", "\\t")
    if quote == "'" then body = body:gsub("'", "\\'") end
    body = body:gsub("[%z\1-\31\127]", function(c) return ("\\x%02x"):format(c:byte()) end)
    return quote .. body .. quote
  end
  if is_undefined(v) then return "Undefined" end
  local parts = {}
  if is_list(v) then
    for i, item in ipairs(v) do parts[i] = repr(item) end
    local text = table.concat(parts, ", ")
    if is_tuple(v) then return "(" .. text .. (#v == 1 and ",)" or ")") end
    return "[" .. text .. "]"
  elseif is_dict(v) then
    for i, key in ipairs(keys_of(v)) do parts[i] = repr(key) .. ": " .. repr(v[key]) end
    return "{" .. table.concat(parts, ", ") .. "}"
  end
  return M.to_string(v)
end

function M.to_string(v)
  v = incoming(v)
  if type(v) == "string" then return v end
  if type(v) == "number" then return number_text(v) end
  if getmetatable(v) == Float then
    return (v.value == 0 and 1 / v.value < 0 and "-0" or number_text(v.value)) .. ".0"
  end
  if v == true then return "True" elseif v == false then return "False" elseif v == null then return "None" end
  if is_undefined(v) then return "" end
  if is_list(v) or is_dict(v) then return repr(v) end
  return tostring(v)
end
local to_string = M.to_string

-- Like json.dumps(ensure_ascii=False).
local function json(v, indent, level, separators, line)
  v = incoming(v)
  if v == null then return "null" end
  local kind = type(v)
  if kind == "boolean" then return tostring(v) end
  if kind == "number" or getmetatable(v) == Float then return M.to_string(v) end
  if kind == "string" then
    return '"' .. v:gsub('[%c"\\]', function(c)
      local short = ({['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t", ["\b"] = "\\b",
                      ["\f"] = "\\f"})[c]
      return short or (c == "\127" and c) or ("\\u%04x"):format(c:byte())
    end) .. '"'
  end
  if not (is_list(v) or is_dict(v)) then fail(line, "tojson cannot write " .. type_name(v)) end
  local parts = {}
  if is_list(v) then
    for i, item in ipairs(v) do parts[i] = json(item, indent, level + 1, separators, line) end
  else
    for i, key in ipairs(keys_of(v)) do
      parts[i] = json(to_string(key)) .. separators[2] .. json(v[key], indent, level + 1, separators, line)
    end
  end
  local open, close = is_list(v) and "[" or "{", is_list(v) and "]" or "}"
  if #parts == 0 or not indent then return open .. table.concat(parts, separators[1]) .. close end
  local pad = "\n" .. indent:rep(level + 1)
  local stop = separators[1]:gsub("%s+$", "")
  return open .. pad .. table.concat(parts, stop .. pad) .. "\n" .. indent:rep(level) .. close
end

-- Operators -----------------------------------------------------------------------------------------------------------

--- The elements that a loop walks: of a list, a mapping's keys, a string's characters.
function M.iterate(v, line)
  if is_undefined(v) then return {} end
  if type(v) == "string" then return characters(v) end
  if is_dict(v) then return keys_of(v) end
  if not is_list(v) then fail(line, "cannot walk over " .. type_name(v)) end
  local out = {}
  for i, item in ipairs(v) do out[i] = incoming(item) end
  return out
end
local iterate = M.iterate

local function contains(v, item, line)
  if is_undefined(v) then return false end
  if type(v) == "string" then
    if type(item) ~= "string" then fail(line, ("'in' looks for %s in a string"):format(type_name(item))) end
    return plain_find(v, item, 1) ~= nil
  end
  if is_dict(v) then
    if is_list(item) and not is_tuple(item) or is_dict(item) then fail(line, type_name(item) .. " cannot be a key") end
    return v[number_of(item) or item] ~= nil
  end
  if not is_list(v) then fail(line, "'in' cannot look into " .. type_name(v)) end
  for _, each in ipairs(v) do if equal(each, item) then return true end end
  return false
end

local function compare_lists(op, a, b, line)
  for i = 1, math.min(#a, #b) do
    if not equal(a[i], b[i]) then return M.compare(op, a[i], b[i], line) end
  end
  return M.compare(op, #a, #b, line)
end

function M.compare(op, a, b, line)
  if op == "==" then return equal(a, b) elseif op == "!=" then return not equal(a, b) end
  if op == "in" then return contains(b, a, line) elseif op == "not in" then return not contains(b, a, line) end
  a, b = number_of(a) or a, number_of(b) or b
  if is_list(a) and is_list(b) and is_tuple(a) == is_tuple(b) then return compare_lists(op, a, b, line) end
  if type(a) ~= type(b) or (type(a) ~= "number" and type(a) ~= "string") then
    fail(line, ("cannot compare %s %s %s"):format(type_name(a), op, type_name(b)))
  end
  if op == "<" then return a < b elseif op == ">" then return a > b elseif op == "<=" then return a <= b end
  return a >= b
end

local function format_text(pattern, args, line)
  local i = 0
  local out = pattern:gsub("%%([-+ #0]*%d*%.?%d*)(.)", function(flags, kind)
    if kind == "%" then return "%" end
    i = i + 1
    local v = args[i]
    if v == nil then fail(line, "too few values for the format") end
    if kind == "s" then return ("%" .. flags .. "s"):format(to_string(v)) end
    if kind == "r" then return repr(v) end
    local number = number_of(v)
    if not kind:match("[dfeEgGxXoi]") or not number then
      fail(line, "the format %" .. kind .. " is not supported here")
    end
    if kind:match("[dixXo]") then number = number < 0 and math.ceil(number) or math.floor(number) end
    return ("%" .. flags .. kind):format(number)
  end)
  if i < #args and not is_dict(args[1]) then fail(line, "too many values for the format") end
  return out
end

local numeric = {
  ["+"] = function(a, b) return a + b end,
  ["-"] = function(a, b) return a - b end,
  ["*"] = function(a, b) return a * b end,
  ["/"] = function(a, b) return a / b end,
  ["//"] = function(a, b) return math.floor(a / b) end,
  ["%"] = function(a, b) return a % b end,
  ["**"] = function(a, b) return a ^ b end,
}

local function repeated(v, times, line)
  if times * #v > 1e7 then fail(line, "a repetition of over ten million elements") end
  if type(v) == "string" then return v:rep(math.max(times, 0)) end
  local out = {}
  for _ = 1, times do for _, item in ipairs(v) do out[#out + 1] = item end end
  return is_tuple(v) and M.tuple(out) or M.list(out)
end

function M.arithmetic(op, a, b, line)
  if op == "~" then return to_string(a) .. to_string(b) end
  local x, y = number_of(a), number_of(b)
  if x and y then
    if y == 0 and (op == "/" or op == "//" or op == "%" or (op == "**" and x == 0 and y < 0)) then
      fail(line, "division by zero")
    end
    local out = numeric[op](x, y)
    if op == "/" or is_float(a) or is_float(b) or (op == "**" and y < 0) then return M.float(out) end
    return out
  end
  if op == "+" and type(a) == "string" and type(b) == "string" then return a .. b end
  if op == "+" and is_list(a) and is_list(b) and is_tuple(a) == is_tuple(b) then
    local out = {}
    for _, v in ipairs(a) do out[#out + 1] = v end
    for _, v in ipairs(b) do out[#out + 1] = v end
    return is_tuple(a) and M.tuple(out) or M.list(out)
  end
  if op == "*" and x and not is_float(a) and (type(b) == "string" or is_list(b)) then return repeated(b, x, line) end
  if op == "*" and y and not is_float(b) and (type(a) == "string" or is_list(a)) then return repeated(a, y, line) end
  if op == "%" and type(a) == "string" then return format_text(a, is_tuple(b) and b or {b}, line) end
  fail(line, ("cannot compute %s %s %s"):format(type_name(a), op, type_name(b)))
end

-- Methods, attributes, items ------------------------------------------------------------------------------------------
-- A method gets the object, the arguments, the named arguments and the line.

local function need_text(v, what, line)
  if type(v) ~= "string" then fail(line, ("%s expects a string, got %s"):format(what, type_name(v))) end
  return v
end

-- One of the named arguments, or the i-th.
local function argument(args, named, i, name, otherwise)
  local v = args[i]
  if v == nil then v = named[name] end
  if v == nil then return otherwise end
  return v
end

local function begins(s, what, at_end)
  if at_end then return what == "" or s:sub(-#what) == what end
  return s:sub(1, #what) == what
end

local function affix_test(at_end)
  return function(s, args, _, line)
    if is_list(args[1]) then
      for _, each in ipairs(args[1]) do if begins(s, each, at_end) then return true end end
      return false
    end
    return begins(s, need_text(args[1], at_end and "endswith" or "startswith", line), at_end)
  end
end

local function all_match(pattern)
  return function(s) return s:find("^" .. pattern .. "+$") ~= nil end
end

local string_methods = {
  strip = function(s, args) return strip(s, args[1], true, true) end,
  lstrip = function(s, args) return strip(s, args[1], true, false) end,
  rstrip = function(s, args) return strip(s, args[1], false, true) end,
  startswith = affix_test(false),
  endswith = affix_test(true),
  split = function(s, args, named)
    return split(s, argument(args, named, 1, "sep"), argument(args, named, 2, "maxsplit"))
  end,
  rsplit = function(s, args, named)
    return split_from_right(s, argument(args, named, 1, "sep"), argument(args, named, 2, "maxsplit"))
  end,
  splitlines = split_lines,
  upper = upper,
  lower = lower,
  title = title,
  capitalize = capitalize,
  replace = function(s, args, named, line)
    return replace_text(s, need_text(args[1], "replace", line), need_text(args[2], "replace", line),
                        argument(args, named, 3, "count"))
  end,
  find = function(s, args, _, line)
    local at = plain_find(s, need_text(args[1], "find", line), 1)
    return at and length_of(s:sub(1, at - 1)) or -1
  end,
  count = function(s, args, _, line) return #split(s, need_text(args[1], "count", line)) - 1 end,
  join = function(s, args, _, line)
    local parts = iterate(args[1], line)
    for i, part in ipairs(parts) do parts[i] = need_text(part, "join", line) end
    return table.concat(parts, s)
  end,
  removeprefix = function(s, args) return begins(s, args[1]) and s:sub(#args[1] + 1) or s end,
  removesuffix = function(s, args) return begins(s, args[1], true) and s:sub(1, #s - #args[1]) or s end,
  isdigit = all_match("%d"), isalpha = all_match("%a"), isalnum = all_match("%w"), isspace = all_match("%s"),
  islower = function(s) return s == lower(s) and s ~= upper(s) end,
  isupper = function(s) return s == upper(s) and s ~= lower(s) end,
}

local function pairs_of(t)
  local out = {}
  for i, key in ipairs(keys_of(t)) do out[i] = M.tuple{key, incoming(t[key])} end
  return M.list(out)
end

local dict_methods = {
  items = pairs_of,
  keys = function(t) return M.list(keys_of(t)) end,
  values = function(t)
    local out = keys_of(t)
    for i, key in ipairs(out) do out[i] = incoming(t[key]) end
    return M.list(out)
  end,
  get = function(t, args)
    local v = incoming(t[args[1]])
    if v == nil then v = args[2] end
    if v == nil then v = null end
    return v
  end,
}

local list_methods = {
  index = function(t, args, _, line)
    for i, v in ipairs(t) do if equal(v, args[1]) then return i - 1 end end
    fail(line, "index: the value is not in the list")
  end,
  count = function(t, args)
    local n = 0
    for _, v in ipairs(t) do if equal(v, args[1]) then n = n + 1 end end
    return n
  end,
}

local function bind(method, object)
  return function(args, named, line) return method(object, args, named, line) end
end

function M.attribute(v, name, line)
  if is_undefined(v) then
    fail(line, ("'%s' is undefined: there is no .%s of it"):format(tostring(v.name), tostring(name)))
  end
  local class = getmetatable(v)
  if type(v) == "string" then
    return string_methods[name] and bind(string_methods[name], v) or undefined(name)
  elseif class == Loop then
    local found = v:get(name)
    if found == nil then return undefined("loop." .. tostring(name)) end
    return found
  elseif class == Namespace then
    local found = rawget(v, name)
    if found == nil then return undefined(name) end
    return incoming(found)
  elseif is_list(v) then
    return list_methods[name] and bind(list_methods[name], v) or undefined(name)
  elseif is_dict(v) then
    if dict_methods[name] then return bind(dict_methods[name], v) end
    local found = incoming(v[name])
    if found == nil then return undefined(name) end
    return found
  end
  return undefined(name)
end

function M.item(v, key, line)
  if type(key) == "number" and (type(v) == "string" or is_list(v)) then
    local list = type(v) == "string" and characters(v) or v
    local found = incoming(list[key < 0 and #list + key + 1 or key + 1])
    if found == nil then return undefined("element " .. number_text(key)) end
    return found
  end
  if is_dict(v) and v[key] ~= nil then return incoming(v[key]) end
  return M.attribute(v, key, line)
end

function M.slice(v, from, to, step, line)
  if is_undefined(v) then fail(line, ("'%s' is undefined: it has no slices"):format(tostring(v.name))) end
  if type(v) ~= "string" and not is_list(v) then fail(line, "there are no slices of " .. type_name(v)) end
  local list, out = type(v) == "string" and characters(v) or v, {}
  local n = #list
  step = step or 1
  if step == 0 then fail(line, "a slice's step cannot be 0") end
  local function clamp(i, otherwise)
    if i == nil then return otherwise end
    if i < 0 then i = i + n end
    return math.max(step > 0 and 0 or -1, math.min(i, step > 0 and n or n - 1))
  end
  from, to = clamp(from, step > 0 and 0 or n - 1), clamp(to, step > 0 and n or -1)
  for i = from, to - (step > 0 and 1 or -1), step do out[#out + 1] = list[i + 1] end
  if type(v) == "string" then return table.concat(out) end
  return is_tuple(v) and M.tuple(out) or M.list(out)
end

-- The `loop` variable -------------------------------------------------------------------------------------------------

Loop.__index = Loop

function M.loop(items) return setmetatable({items = items, i = 0}, Loop) end
function Loop:at(i) self.i = i end

function Loop:get(name)
  local i, n = self.i, #self.items
  if name == "index" then return i elseif name == "index0" then return i - 1
  elseif name == "revindex" then return n - i + 1 elseif name == "revindex0" then return n - i
  elseif name == "first" then return i == 1 elseif name == "last" then return i == n
  elseif name == "length" then return n
  elseif name == "depth" then return 1 elseif name == "depth0" then return 0
  elseif name == "previtem" then return self.items[i - 1]
  elseif name == "nextitem" then return self.items[i + 1]
  elseif name == "cycle" then return function(args) return args[(i - 1) % #args + 1] end
  elseif name == "changed" then
    return function(args)
      local before = self.before
      self.before = args
      return not (before and equal(M.list(before), M.list(args)))
    end
  end
end

-- Tests ---------------------------------------------------------------------------------------------------------------

local function is_number(v) return number_of(v) ~= nil end
local function comparing(op) return function(v, other, line) return M.compare(op, v, other, line) end end

local tests = {
  defined = function(v) return not is_undefined(v) end,
  undefined = is_undefined,
  none = function(v) return v == null end,
  string = function(v) return type(v) == "string" end,
  number = is_number,
  integer = function(v) return type(v) == "number" and v == math.floor(v) end,
  float = is_float,
  boolean = function(v) return type(v) == "boolean" end,
  ["true"] = function(v) return v == true end,
  ["false"] = function(v) return v == false end,
  mapping = function(v) return is_dict(v) or M.is_namespace(v) end,
  sequence = function(v) return type(v) == "string" or is_list(v) or is_dict(v) or is_undefined(v) end,
  iterable = function(v) return type(v) == "string" or is_list(v) or is_dict(v) or is_undefined(v) end,
  callable = function(v) return type(v) == "function" end,
  ["in"] = comparing("in"),
  eq = comparing("=="), equalto = comparing("=="), ["=="] = comparing("=="),
  ne = comparing("!="), ["!="] = comparing("!="),
  lt = comparing("<"), lessthan = comparing("<"), gt = comparing(">"), greaterthan = comparing(">"),
  le = comparing("<="), ge = comparing(">="),
  odd = function(v, _, line) return M.arithmetic("%", v, 2, line) == 1 end,
  even = function(v, _, line) return M.arithmetic("%", v, 2, line) == 0 end,
  divisibleby = function(v, other, line) return number_of(M.arithmetic("%", v, other, line)) == 0 end,
  sameas = function(v, other) return rawequal(v, other) end,
  lower = function(v) return string_methods.islower(to_string(v)) end,
  upper = function(v) return string_methods.isupper(to_string(v)) end,
}
M.tests = tests

-- What the filters need besides.
M.internal = {
  is_list = is_list, is_dict = is_dict, type_name = type_name, strip = strip, split = split,
  replace_text = replace_text, upper = upper, lower = lower, title = title, capitalize = capitalize,
  number_text = number_text,
  length_of = length_of, keys_of = keys_of, repr = repr, characters = characters, string_methods = string_methods,
  plain_find = plain_find, split_lines = split_lines, need_text = need_text, equal = equal,
  pairs_of = pairs_of, argument = argument, format_text = format_text, json = json,
}

-- Functions -----------------------------------------------------------------------------------------------------------

M.globals = {
  range = function(args, _, line)
    local from, to, step = 0, args[1], args[3] or 1
    if args[2] ~= nil then from, to = args[1], args[2] end
    local out = {}
    if math.abs((to - from) / step) > 1e6 then fail(line, "range: more than a million values") end
    for i = from, to - (step > 0 and 1 or -1), step do out[#out + 1] = i end
    return M.list(out)
  end,
  namespace = function(args, named)
    local out = setmetatable({}, Namespace)
    for k, v in pairs(args[1] or {}) do out[k] = v end
    for k, v in pairs(named) do out[k] = v end
    return out
  end,
  dict = function(args, named)
    local out = {}
    for k, v in pairs(args[1] or {}) do out[k] = v end
    for k, v in pairs(named) do out[k] = v end
    return M.object(out)
  end,
  raise_exception = function(args) error("chat template: " .. to_string(args[1]), 0) end,
  strftime_now = function(args) return os.date(args[1]) end,
}

return M
