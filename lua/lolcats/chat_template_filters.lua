--- Filters of chat templates. A filter gets the value, the arguments, the named arguments and the line.

local values = require "lolcats.chat_template_values"

local internal = values.internal
local null, undefined, is_undefined = values.null, values.undefined, values.is_undefined
local truthy, to_string, fail = values.truthy, values.to_string, values.fail
local iterate, tests = values.iterate, values.tests
local is_list, is_dict, type_name, argument = internal.is_list, internal.is_dict, internal.type_name, internal.argument
local strip, split, replace_text, length_of = internal.strip, internal.split, internal.replace_text, internal.length_of
local repr, keys_of, pairs_of = internal.repr, internal.keys_of, internal.pairs_of

local filters = {}

function filters.trim(v, args, named) return strip(to_string(v), argument(args, named, 1, "chars"), true, true) end
function filters.upper(v) return internal.upper(to_string(v)) end
function filters.lower(v) return internal.lower(to_string(v)) end
function filters.title(v)
  return (to_string(v):gsub("[^-%s({%[<]+", function(word)
    local first = internal.characters(word)[1]
    return internal.upper(first) .. internal.lower(word:sub(#first + 1))
  end))
end
function filters.capitalize(v) return internal.capitalize(to_string(v)) end
function filters.string(v) return to_string(v) end
function filters.safe(v) return v end
function filters.list(v, _, _, line) return values.list(iterate(v, line)) end
function filters.abs(v, _, _, line)
  local n = values.number_of(v)
  if not n then fail(line, "abs: a number is needed, got " .. type_name(v)) end
  return type(v) == "table" and values.float(math.abs(n)) or math.abs(n)
end

function filters.tojson(v, args, named, line)
  if is_undefined(v) then fail(line, ("tojson: '%s' is undefined"):format(tostring(v.name))) end
  local indent = argument(args, named, 2, "indent")
  if args[1] and args[2] == nil and type(args[1]) == "number" then indent = args[1] end
  if type(indent) == "number" then indent = (" "):rep(indent) end
  if indent == null then indent = nil end
  local given = named.separators
  local separators = is_list(given) and given or {", ", ": "}
  return internal.json(v, indent, 0, separators, line)
end

function filters.length(v, _, _, line)
  if type(v) == "string" then return length_of(v) end
  if is_undefined(v) then return 0 end
  if is_list(v) then return #v end
  if not is_dict(v) then fail(line, "there is no length of " .. type_name(v)) end
  return #keys_of(v)
end
filters.count = filters.length

function filters.default(v, args, named)
  local otherwise, falsy = argument(args, named, 1, "default_value", ""), argument(args, named, 2, "boolean", false)
  if is_undefined(v) or (truthy(falsy) and not truthy(v)) then return otherwise end
  return v
end
filters.d = filters.default

local function by_path(v, path, line)
  for step in to_string(path):gmatch("[^.]+") do v = values.item(v, tonumber(step) or step, line) end
  return v
end

function filters.join(v, args, named, line)
  local parts, attribute = iterate(v, line), argument(args, named, 2, "attribute")
  for i, part in ipairs(parts) do
    if attribute then part = by_path(part, attribute, line) end
    parts[i] = to_string(part)
  end
  return table.concat(parts, to_string(argument(args, named, 1, "d", "")))
end

function filters.replace(v, args, named)
  return replace_text(to_string(v), to_string(args[1]), to_string(args[2]), argument(args, named, 3, "count"))
end

function filters.first(v, _, _, line)
  local first = iterate(v, line)[1]
  return first == nil and undefined("the first of nothing") or first
end

function filters.last(v, _, _, line)
  local all = iterate(v, line)
  return #all == 0 and undefined("the last of nothing") or all[#all]
end

function filters.items(v, _, _, line)
  if is_undefined(v) then return values.list{} end
  if not is_dict(v) then fail(line, "there are no items of " .. type_name(v)) end
  return pairs_of(v)
end

filters["int"] = function(v, args, named)
  local n = values.number_of(v) or (type(v) == "string" and tonumber(values.strip_right(v)))
  if not n then return argument(args, named, 1, "default", 0) end
  return n < 0 and math.ceil(n) or math.floor(n)
end

filters["float"] = function(v, args, named)
  local n = values.number_of(v) or (type(v) == "string" and tonumber(values.strip_right(v)))
  return n and values.float(n) or argument(args, named, 1, "default", values.float(0))
end

function filters.reverse(v, _, _, line)
  local all, out = iterate(v, line), {}
  for i = #all, 1, -1 do out[#out + 1] = all[i] end
  return type(v) == "string" and table.concat(out) or values.list(out)
end

-- Stable, as Python's; texts without regard to case unless asked.
local function sorted(all, reverse, key, line)
  local keyed = {}
  for i, v in ipairs(all) do keyed[i] = {key(v), v} end
  for i = 2, #keyed do
    local item, at = keyed[i], i - 1
    while at >= 1 do
      local before = keyed[at][1]
      if not values.compare(reverse and "<" or ">", before, item[1], line) then break end
      keyed[at + 1], at = keyed[at], at - 1
    end
    keyed[at + 1] = item
  end
  for i, pair in ipairs(keyed) do keyed[i] = pair[2] end
  return values.list(keyed)
end

local function key_function(attribute, case_sensitive, line)
  return function(v)
    if attribute ~= nil and attribute ~= null then v = by_path(v, attribute, line) end
    return type(v) == "string" and not truthy(case_sensitive) and internal.lower(v) or v
  end
end

function filters.sort(v, args, named, line)
  local case_sensitive = argument(args, named, 2, "case_sensitive", false)
  local key = key_function(argument(args, named, 3, "attribute"), case_sensitive, line)
  return sorted(iterate(v, line), truthy(argument(args, named, 1, "reverse", false)), key, line)
end

function filters.dictsort(v, args, named, line)
  local place = argument(args, named, 2, "by", "key") == "value" and 2 or 1
  local fold = key_function(nil, argument(args, named, 1, "case_sensitive", false), line)
  local function key(pair) return fold(pair[place]) end
  return sorted(pairs_of(v), truthy(argument(args, named, 3, "reverse", false)), key, line)
end

function filters.unique(v, args, named, line)
  local case_sensitive = argument(args, named, 1, "case_sensitive", false)
  local key = key_function(argument(args, named, 2, "attribute"), case_sensitive, line)
  local out, seen = {}, {}
  for _, item in ipairs(iterate(v, line)) do
    local mark = repr(key(item))
    if not seen[mark] then out[#out + 1], seen[mark] = item, true end
  end
  return values.list(out)
end

function filters.map(v, args, named, line)
  local out = {}
  for i, item in ipairs(iterate(v, line)) do
    if named.attribute ~= nil then
      local found = by_path(item, named.attribute, line)
      if is_undefined(found) and named.default ~= nil then found = named.default end
      out[i] = found
    else
      local filter = filters[args[1]]
      if not filter then fail(line, ("the filter '%s' is not supported"):format(tostring(args[1]))) end
      out[i] = filter(item, {unpack(args, 2)}, named, line)
    end
  end
  return values.list(out)
end

-- select, reject, selectattr, rejectattr
local function choosing(keep, by_attribute)
  return function(v, args, _, line)
    local out, at = {}, by_attribute and 2 or 1
    local name = args[at]
    local test = name and tests[name] or truthy
    if name and not tests[name] then fail(line, ("the test '%s' is not supported"):format(tostring(name))) end
    for _, item in ipairs(iterate(v, line)) do
      local looked = item
      if by_attribute then looked = by_path(item, args[1], line) end
      if (test(looked, args[at + 1], line) and true or false) == keep then out[#out + 1] = item end
    end
    return values.list(out)
  end
end
filters.select, filters.reject = choosing(true, false), choosing(false, false)
filters.selectattr, filters.rejectattr = choosing(true, true), choosing(false, true)

function filters.indent(v, args, named)
  local width = argument(args, named, 1, "width", 4)
  local pad = type(width) == "number" and (" "):rep(width) or width
  local blank = truthy(argument(args, named, 3, "blank", false))
  local first = truthy(argument(args, named, 2, "first", false))
  local lines = internal.split_lines(to_string(v) .. "\n")
  for i, line in ipairs(lines) do
    if (i > 1 and (line ~= "" or blank)) or (i == 1 and first) then lines[i] = pad .. line end
  end
  return table.concat(lines, "\n")
end

function filters.escape(v)
  local names = {["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&#34;", ["'"] = "&#39;"}
  return (to_string(v):gsub("[&<>\"']", names))
end
filters.e = filters.escape

function filters.sum(v, args, named, line)
  local total = argument(args, named, 2, "start", 0)
  local attribute = argument(args, named, 1, "attribute")
  for _, item in ipairs(iterate(v, line)) do
    total = values.arithmetic("+", total, attribute and by_path(item, attribute, line) or item, line)
  end
  return total
end

local function extreme(op)
  return function(v, _, named, line)
    local key, best = key_function(named.attribute, named.case_sensitive, line), nil
    for _, item in ipairs(iterate(v, line)) do
      if best == nil or values.compare(op, key(item), key(best), line) then best = item end
    end
    return best == nil and undefined("the extreme of nothing") or best
  end
end
filters.min, filters.max = extreme("<"), extreme(">")

function filters.round(v, args, named, line)
  local whole = type(v) ~= "table" and v == math.floor(v) and argument(args, named, 2, "method", "common") == "common"
  v = values.number_of(v)
  if not v then fail(line, "round: a number is needed") end
  if whole then return v end
  local scale = 10 ^ argument(args, named, 1, "precision", 0)
  local method = argument(args, named, 2, "method", "common")
  local x = v * scale
  if method == "ceil" then return values.float(math.ceil(x) / scale) end
  if method == "floor" then return values.float(math.floor(x) / scale) end
  local low = math.floor(x) -- halves go to the even neighbour
  local up = x - low > 0.5 or (x - low == 0.5 and low % 2 == 1)
  return values.float((up and low + 1 or low) / scale)
end

function filters.batch(v, args, named, line)
  local size, fill = argument(args, named, 1, "linecount"), argument(args, named, 2, "fill_with")
  local out = {}
  for i, item in ipairs(iterate(v, line)) do
    if (i - 1) % size == 0 then out[#out + 1] = values.list{} end
    table.insert(out[#out], item)
  end
  while fill ~= nil and fill ~= null and #out > 0 and #out[#out] < size do table.insert(out[#out], fill) end
  return values.list(out)
end

function filters.slice(v, args, named, line)
  local all, n, fill = iterate(v, line), argument(args, named, 1, "slices"), argument(args, named, 2, "fill_with")
  local each, more, out, at = math.floor(#all / n), #all % n, {}, 1
  for i = 1, n do
    local part = values.list{}
    for _ = 1, each + (i <= more and 1 or 0) do
      part[#part + 1] = all[at]
      at = at + 1
    end
    if fill ~= nil and fill ~= null and i > more then part[#part + 1] = fill end
    out[i] = part
  end
  return values.list(out)
end

function filters.groupby(v, args, named, line)
  local attribute, case_sensitive = argument(args, named, 1, "attribute"), argument(args, named, 3, "case_sensitive",
                                                                                    false)
  local otherwise = argument(args, named, 2, "default")
  local fold = key_function(nil, case_sensitive, line)
  local function key(item)
    local found = by_path(item, attribute, line)
    if is_undefined(found) and otherwise ~= nil then found = otherwise end
    return fold(found)
  end
  local out
  for _, item in ipairs(sorted(iterate(v, line), false, key, line)) do
    local group = out and out[#out]
    if not group or not internal.equal(key(group[2][1]), key(item)) then
      local name = by_path(item, attribute, line)
      if is_undefined(name) and otherwise ~= nil then name = otherwise end
      group = values.tuple{name, values.list{}}
      out = out or {}
      out[#out + 1] = group
    end
    table.insert(group[2], item)
  end
  return values.list(out or {})
end

function filters.format(v, args, _, line) return internal.format_text(to_string(v), args, line) end
function filters.center(v, args, named, line)
  return internal.string_methods.center(to_string(v), {argument(args, named, 1, "width", 80)}, {}, line)
end

function tests.filter(v) return type(v) == "string" and filters[v] ~= nil end
function tests.test(v) return type(v) == "string" and tests[v] ~= nil end

-- Runs of word characters; outside ASCII, what is neither space nor punctuation of the common blocks counts as one.
function filters.wordcount(v)
  local s = values.strip_right(to_string(v)):gsub("\226[\128\129][\128-\191]", " "):gsub("\227\128[\128-\191]", " ")
  return select(2, s:gsub("[%w_\128-\255]+", ""))
end

return filters
