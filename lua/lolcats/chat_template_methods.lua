--- The less common methods of strings in chat templates, added to those of chat_template_values: padding, searching
-- from the right, partitions, and str.format. A method gets the string, the arguments, the named arguments and the
-- line.

local values = require "lolcats.chat_template_values"

local internal = values.internal
local methods = internal.string_methods
local fail, to_string, null = values.fail, values.to_string, values.null
local length_of, characters, need_text = internal.length_of, internal.characters, internal.need_text

-- Padding -------------------------------------------------------------------------------------------------------------

local function padding(s, args, line)
  local width, fill = values.number_of(args[1]), args[2] or " "
  if not width or width > 1e6 then fail(line, "padding: a width of at most a million is needed") end
  if length_of(need_text(fill, "padding", line)) ~= 1 then fail(line, "padding: the fill is one character") end
  return math.max(0, width - length_of(s)), fill, width
end

function methods.ljust(s, args, _, line)
  local n, fill = padding(s, args, line)
  return s .. fill:rep(n)
end

function methods.rjust(s, args, _, line)
  local n, fill = padding(s, args, line)
  return fill:rep(n) .. s
end

function methods.center(s, args, _, line)
  local n, fill, width = padding(s, args, line)
  local left = math.floor(n / 2) + (n % 2 == 1 and width % 2 == 1 and 1 or 0) -- as Python rounds
  return fill:rep(left) .. s .. fill:rep(n - left)
end

function methods.zfill(s, args, _, line)
  local n = padding(s, args, line)
  local sign = s:match("^[+-]") or ""
  return sign .. ("0"):rep(n) .. s:sub(#sign + 1)
end

-- Searching -----------------------------------------------------------------------------------------------------------

local function last_find(s, what)
  local found, at = nil, 1
  while true do
    local a = internal.plain_find(s, what, at)
    if not a then return found end
    found, at = a, a + 1
  end
end

function methods.rfind(s, args, _, line)
  local at = last_find(s, need_text(args[1], "rfind", line))
  return at and length_of(s:sub(1, at - 1)) or -1
end

function methods.index(s, args, named, line)
  local at = methods.find(s, args, named, line)
  if at < 0 then fail(line, "index: the text is not there") end
  return at
end

function methods.rindex(s, args, named, line)
  local at = methods.rfind(s, args, named, line)
  if at < 0 then fail(line, "rindex: the text is not there") end
  return at
end

local function partition(find, empty_first)
  return function(s, args, _, line)
    local what = need_text(args[1], "partition", line)
    if what == "" then fail(line, "partition: an empty separator") end
    local at = find(s, what, 1)
    if not at then return values.tuple(empty_first and {"", "", s} or {s, "", ""}) end
    return values.tuple{s:sub(1, at - 1), what, s:sub(at + #what)}
  end
end
methods.partition = partition(internal.plain_find, false)
methods.rpartition = partition(last_find, true)

-- Case ----------------------------------------------------------------------------------------------------------------

function methods.swapcase(s)
  local out = {}
  for i, c in ipairs(characters(s)) do
    local upper = internal.upper(c)
    out[i] = c == upper and internal.lower(c) or upper
  end
  return table.concat(out)
end

function methods.istitle(s) return s == internal.title(s) and internal.upper(s) ~= internal.lower(s) end

function methods.expandtabs(s, args, named)
  local size, column, out = internal.argument(args, named, 1, "tabsize", 8), 0, {}
  for i, c in ipairs(characters(s)) do
    local n = c == "\t" and (size > 0 and size - column % size or 0) or 1
    out[i] = c == "\t" and (" "):rep(n) or c
    column = (c == "\n" or c == "\r") and 0 or column + n
  end
  return table.concat(out)
end

-- str.format ----------------------------------------------------------------------------------------------------------

-- The part behind the colon: [[fill]align][0][width][,][.precision][type].
local function formatted(v, spec, line)
  if spec == "" then return to_string(v) end
  local fill, align, rest = spec:match("^(.)([<>^])(.*)$")
  if not align then
    fill, align, rest = " ", spec:match("^([<>^]?)(.*)$")
  end
  local zero, width, comma, precision, kind = rest:match("^(0?)(%d*)(,?)%.?(%d*)([sdfgeExXob%%]?)$")
  local number = values.number_of(v)
  if not zero or comma ~= "" or kind:match("[ob%%]") or (kind:match("[dfgeExX]") and not number) then
    fail(line, ("the format '%s' is not supported here"):format(spec))
  end
  local text
  if number and kind ~= "" and kind ~= "s" then
    text = ("%" .. (precision ~= "" and "." .. precision or "") .. kind):format(number)
  else
    text = to_string(v)
    if precision ~= "" then
      text = table.concat(characters(text), "", 1, math.min(tonumber(precision), length_of(text)))
    end
  end
  if width == "" then return text end
  if zero ~= "" then return methods.zfill(text, {tonumber(width)}, {}, line) end
  if align == "" then align = number and ">" or "<" end
  local pad = align == "<" and methods.ljust or align == ">" and methods.rjust
  if pad then return pad(text, {tonumber(width), fill}, {}, line) end
  local n = math.max(0, tonumber(width) - length_of(text))
  return fill:rep(math.floor(n / 2)) .. text .. fill:rep(n - math.floor(n / 2))
end

function methods.format(s, args, named, line)
  local next_one = 0
  local out = s:gsub("{{", "\1"):gsub("}}", "\2"):gsub("{([^{}]*)}", function(field)
    local name, spec = field:match("^([^:]*):?(.*)$")
    if name:find("[!.%[]") then fail(line, ("the format field {%s} is not supported"):format(field)) end
    if name == "" then
      next_one = next_one + 1
      name = next_one
    end
    local v = type(name) == "number" and args[name] or name:match("^%d+$") and args[tonumber(name) + 1] or named[name]
    if v == nil then fail(line, ("format: there is no value for {%s}"):format(field)) end
    return formatted(v == nil and null or v, spec, line)
  end)
  return (out:gsub("\1", "{"):gsub("\2", "}"))
end

return methods
