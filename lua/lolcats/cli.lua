-- cli.lua: a recipe's arguments. lc.args declares them once, with their defaults and help; from that come types,
-- --help, the overlay of a YAML file (--config) and errors with a suggestion. Owns nothing else: running files is
-- main.lua's.
local cli = {}

-- Stands for a default where there is none: the user must give the argument.
cli.required = setmetatable({}, {__tostring = function() return "required" end})

-- What the last lc.args resolved to: {name=, file=, source=, order={names}, values={name=value}, argv={...}}, or nil. A
-- run folder stores it.
cli.current = nil

-- Set by --trust-code: code that came with a checkpoint may run.
cli.trust_code = false
function cli.trust()
  cli.trust_code = true
  local lc = package.loaded["lolcats"]
  if type(lc) == "table" then rawset(lc, "trust_code", true) end
end

-- The script being run, set by main.lua: {name=, file=, source=}.
cli.script = nil

-- Raises a usage error: one message, exit status 2.
function cli.usage(fmt, ...)
  local message = select("#", ...) > 0 and fmt:format(...) or fmt
  error(setmetatable({code = "EUSAGE", message = message}, {__tostring = function(e) return e.message end}), 0)
end

-- Ends the program with a status, from anywhere, after unwinding.
function cli.exit(status)
  error(setmetatable({exit = status or 0}, {__tostring = function(e) return "exit " .. e.exit end}), 0)
end

---- suggestions ----------------------------------------------------------------------------------------------------------

-- Edit distance with transpositions.
local function distance(a, b)
  local before, last, row = {}, {}, {}
  for j = 0, #b do last[j] = j end
  for i = 1, #a do
    row[0] = i
    for j = 1, #b do
      local cost = a:byte(i) == b:byte(j) and 0 or 1
      local d = math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + cost)
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        d = math.min(d, before[j - 2] + 1)
      end
      row[j] = d
    end
    before, last, row = last, row, before
  end
  return last[#b]
end

-- The nearest of `names` to `word`, or nil when none is near.
function cli.suggest(word, names)
  local best, best_d
  local lower = word:lower()
  for _, name in ipairs(names) do
    local d = distance(lower, name:lower())
    if #word >= 3 and name:lower():sub(1, #word) == lower then d = math.min(d, 1) end
    if not best_d or d < best_d or (d == best_d and name < best) then best, best_d = name, d end
  end
  if best and best_d <= math.max(1, math.floor(#word / 3)) and best_d < #word then return best end
end

local function did_you_mean(word, names, prefix)
  local near = cli.suggest(word, names)
  return near and ("; did you mean %s%s?"):format(prefix or "", near) or ""
end

---- declaration ----------------------------------------------------------------------------------------------------------

local function type_of(spec)
  if spec.type then return spec.type end
  local default = spec.default
  if default == cli.required or default == nil then return "string" end
  if type(default) == "table" then return "list" end
  return type(default)
end

local function add(options, name, row, at)
  local spec = {
    name = name, default = row[at], help = row[at + 1] or row.help or "", choices = row.choices or row[at + 2],
    type = row.type, positional = row.positional, min = row.min, max = row.max, item = row.item,
  }
  spec.type = type_of(spec)
  if spec.type == "list" then
    spec.item = spec.item or type((spec.default ~= cli.required and spec.default or {})[1])
    if spec.item ~= "number" then spec.item = "string" end
  end
  if options.by_name[name] then error("lc.args: " .. name .. " is declared twice", 4) end
  options[#options + 1] = spec
  options.by_name[name] = spec
end

-- Named rows have no order in a Lua table; their order in the source text is the declared one.
local function source_order(names, text)
  local place = {}
  for _, name in ipairs(names) do
    local at = text and (text:find("%f[%w_]" .. name .. "%s*=%s*{") or text:find('"' .. name .. '"', 1, true))
    place[name] = at or math.huge
  end
  table.sort(names, function(a, b)
    if place[a] ~= place[b] then return place[a] < place[b] end
    return a < b
  end)
end

-- {"summary", {"name", default, "help"[, choices]}, ..., name = {default, "help"[, choices]}} -> list of specs with
-- .by_name, .summary.
local function declare(spec, text)
  local options = {by_name = {}, summary = ""}
  local function read(row)
    if type(row) == "string" then
      options.summary = options.summary == "" and row or options.summary .. "\n" .. row
    elseif type(row) == "table" and type(row[1]) == "string" then
      add(options, row[1], row, 2)
    elseif type(row) == "table" and (type(row[1]) == "table" or next(row) == nil) then
      for _, inner in ipairs(row) do read(inner) end
    else
      error('lc.args: a row is {"name", default, "help"}, or a list of rows', 4)
    end
  end
  for _, row in ipairs(spec) do read(row) end
  local named = {}
  for name, row in pairs(spec) do
    if type(name) == "string" then
      if type(row) ~= "table" then row = {row}; spec[name] = row end
      named[#named + 1] = name
    end
  end
  source_order(named, text)
  for _, name in ipairs(named) do add(options, name, spec[name], 1) end
  return options
end

local function spelled(name) return (name:gsub("_", "-")) end

---- values ---------------------------------------------------------------------------------------------------------------

local truth = {
  ["true"] = true, yes = true, on = true, ["1"] = true, ["false"] = false, no = false, off = false, ["0"] = false,
}

local function show(v)
  if v == true then return "yes" elseif v == false then return "no" end
  if type(v) == "table" then
    local out = {}
    for i, x in ipairs(v) do out[i] = show(x) end
    return table.concat(out, ",")
  end
  return type(v) == "number" and ("%.14g"):format(v) or tostring(v)
end

local function to_number(v)
  local n = tonumber(v)
  if not n or n ~= n then return nil end
  return n
end

-- One value (a string of the command line, or a value of a YAML file) as the option's type; nil and why when it does
-- not fit.
local function convert(spec, v, item)
  local kind = item or spec.type
  local out
  if kind == "number" then
    out = type(v) ~= "boolean" and type(v) ~= "table" and to_number(v) or nil
    if not out then return nil, ("takes a number, not '%s'"):format(show(v)) end
    if spec.min and out < spec.min then return nil, ("must be at least %s, not %s"):format(show(spec.min), show(out)) end
    if spec.max and out > spec.max then return nil, ("must be at most %s, not %s"):format(show(spec.max), show(out)) end
  elseif kind == "boolean" then
    if type(v) == "boolean" then return v end
    out = truth[tostring(v):lower()]
    if out == nil then return nil, ("takes yes or no, not '%s'"):format(show(v)) end
  elseif kind == "list" then
    out = {}
    if type(v) ~= "table" then
      local parts = {}
      for part in (tostring(v) .. ","):gmatch("([^,]*),") do
        part = part:match("^%s*(.-)%s*$")
        if part ~= "" then parts[#parts + 1] = part end
      end
      v = parts
    end
    for i, x in ipairs(v) do
      local y, why = convert(spec, x, spec.item)
      if y == nil then return nil, why end
      out[i] = y
    end
    return out
  else
    if type(v) == "table" then return nil, "takes one value, not a list or a map" end
    out = type(v) == "string" and v or show(v)
  end
  if spec.choices then
    for _, choice in ipairs(spec.choices) do
      if choice == out then return out end
    end
    local names = {}
    for i, choice in ipairs(spec.choices) do names[i] = show(choice) end
    return nil, ("takes one of %s, not '%s'%s"):format(table.concat(names, ", "), show(out), did_you_mean(show(out), names))
  end
  return out
end

local function names_of(options)
  local names = {}
  for i, spec in ipairs(options) do names[i] = spelled(spec.name) end
  return names
end

local function find(options, word)
  return options.by_name[word] or options.by_name[(word:gsub("-", "_"))]
end

---- reading --------------------------------------------------------------------------------------------------------------

-- Values of a YAML file, by option.
local function read_config(options, path, values)
  local files = require "lolcats.files"
  local ok, tree = pcall(files.read_yaml, path)
  if not ok then cli.usage("--config %s: %s", path, tostring(type(tree) == "table" and tree.message or tree)) end
  if tree == nil or tree == files.null then return end
  if type(tree) ~= "table" or #tree > 0 then cli.usage("%s: expected a map of options", path) end
  for key, v in pairs(tree) do
    local spec = type(key) == "string" and find(options, key)
    if not spec then
      key = tostring(key)
      cli.usage("%s: unknown option '%s'%s", path, key, did_you_mean(key, names_of(options)))
    end
    if v ~= files.null then
      local value, why = convert(spec, v)
      if value == nil then cli.usage("%s: %s %s", path, key, why) end
      values[spec.name] = value
    end
  end
end

-- One "--word[=value]" at argv[i]; returns the next i.
local function read_option(options, argv, i, values, given)
  local word, value = argv[i]:match("^%-%-([^=]+)=(.*)$")
  word = word or argv[i]:sub(3)
  local spec, off = find(options, word), false
  if not spec and word:match("^no%-") then
    spec = find(options, word:sub(4))
    if spec and spec.type ~= "boolean" then cli.usage("--%s: --%s is not a switch", word, spelled(spec.name)) end
    off = spec ~= nil
  end
  if not spec then
    local names = names_of(options)
    for _, extra in ipairs {"help", "config"} do names[#names + 1] = extra end
    cli.usage("unknown option --%s%s", word, did_you_mean(word, names, "--"))
  end
  if spec.type == "boolean" and value == nil then
    values[spec.name] = not off
    return i + 1
  end
  if off then cli.usage("--%s takes no value", word) end
  if value == nil then
    i = i + 1
    value = argv[i]
    if value == nil then cli.usage("--%s needs a value", word) end
    if value:match("^%-%-%a") then
      cli.usage("--%s needs a value; %s is an option (--%s=%s if it is meant)", word, value, word, value)
    end
  end
  local v, why = convert(spec, value)
  if v == nil then cli.usage("--%s %s", word, why) end
  if spec.type == "list" and given[spec.name] then -- a repeated list option adds
    local all = {}
    for _, x in ipairs(values[spec.name]) do all[#all + 1] = x end
    for _, x in ipairs(v) do all[#all + 1] = x end
    v = all
  end
  given[spec.name] = true
  values[spec.name] = v
  return i + 1
end

local function take_positional(options, word, values, given)
  for _, spec in ipairs(options) do
    if spec.positional and (spec.type == "list" or not given[spec.name]) then
      local v, why = convert(spec, word, spec.item)
      if v == nil then cli.usage("%s %s", spec.name, why) end
      if spec.type == "list" then
        local all = given[spec.name] and values[spec.name] or {}
        all[#all + 1] = v
        v = all
      end
      given[spec.name] = true
      values[spec.name] = v
      return
    end
  end
  local names = names_of(options)
  local near = cli.suggest(word, names)
  cli.usage("unexpected argument '%s'%s", word, near and ("; did you mean --%s?"):format(near) or "")
end

-- Resolves argv by the declaration. Returns the values, and the wish for help if there is one.
local function resolve(options, argv)
  local from_file, values, given, config = {}, {}, {}, nil
  local i, only_positional = 1, false
  while i <= #argv do
    local word = argv[i]
    if only_positional or not word:match("^%-") or word == "-" then
      take_positional(options, word, values, given)
      i = i + 1
    elseif word == "--" then
      only_positional, i = true, i + 1
    elseif word == "--help" or word == "-h" then
      return nil, "help"
    elseif word == "--trust-code" and not options.by_name.trust_code then
      cli.trust()
      i = i + 1
    elseif (word == "--config" or word:match("^%-%-config=")) and not options.by_name.config then
      config = word:match("^%-%-config=(.*)$")
      if not config then
        i = i + 1
        config = argv[i] or cli.usage("--config needs a file")
      end
      read_config(options, config, from_file)
      i = i + 1
    elseif word:match("^%-%-.") then
      i = read_option(options, argv, i, values, given)
    else
      cli.usage("unknown option %s%s", word, did_you_mean(word:gsub("^%-", ""), names_of(options), "--"))
    end
  end
  for _, spec in ipairs(options) do
    local name = spec.name
    if values[name] == nil then values[name] = from_file[name] end
    if values[name] == nil then
      if spec.default == cli.required then
        cli.usage("%s is required: %s", spec.positional and name or "--" .. spelled(name), spec.help)
      end
      values[name] = spec.default
    end
  end
  return values
end

---- help -----------------------------------------------------------------------------------------------------------------

local kinds = {number = "N", string = "TEXT", list = "A,B,.."}

local function wrap(text, width, indent)
  local lines, line = {}, ""
  for word in text:gmatch("%S+") do
    if line ~= "" and #line + 1 + #word > width then
      lines[#lines + 1] = line
      line = word
    else
      line = line == "" and word or line .. " " .. word
    end
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n" .. (" "):rep(indent))
end

function cli.help_text(options, name)
  local rows, left = {}, 0
  local usage = "Usage: lolcats " .. (name or "FILE.lua")
  for _, spec in ipairs(options) do
    local head, note
    if spec.type == "boolean" then
      head = (spec.default == true and "--[no-]" or "--") .. spelled(spec.name)
    else
      head = "--" .. spelled(spec.name) .. " " .. (spec.choices and "CHOICE" or kinds[spec.type] or "TEXT")
    end
    if spec.positional then
      local form = spec.default == cli.required and " %s%s" or " [%s%s]"
      usage = usage .. form:format(spec.name:upper(), spec.type == "list" and ".." or "")
    end
    if spec.default == cli.required then note = "required"
    elseif spec.type == "boolean" then note = spec.default and "default yes" or nil
    elseif spec.default ~= nil and show(spec.default) ~= "" then note = "default " .. show(spec.default) end
    local text = spec.help
    if spec.choices then
      local all = {}
      for i, choice in ipairs(spec.choices) do all[i] = show(choice) end
      text = text .. (text == "" and "" or ": ") .. table.concat(all, " | ")
    end
    if note then text = text .. (text == "" and "(" or " (") .. note .. ")" end
    rows[#rows + 1] = {head, text}
  end
  if #options > 0 then rows[#rows + 1] = {"--config FILE", "YAML file of these options; the command line wins"} end
  rows[#rows + 1] = {"--help", "this text"}
  for _, row in ipairs(rows) do left = math.max(left, #row[1]) end
  left = math.min(left, 28)
  local out = {usage .. " [options]", ""}
  if options.summary ~= "" then
    out[#out + 1] = wrap(options.summary, 96, 0)
    out[#out + 1] = ""
  end
  for _, row in ipairs(rows) do
    local head = #row[1] > left and row[1] .. "\n" .. (" "):rep(left + 4) or row[1] .. (" "):rep(left - #row[1] + 2)
    out[#out + 1] = "  " .. head .. wrap(row[2], 96 - left, left + 4)
  end
  return table.concat(out, "\n")
end

---- the interface --------------------------------------------------------------------------------------------------------

-- Reading or writing a name that was not declared is a mistake in the recipe.
local function strict(values, options)
  local function unknown(_, name)
    if options.by_name[name] then return nil end
    name = tostring(name)
    error(("args.%s is not declared by lc.args%s"):format(name, did_you_mean(name, names_of(options), "args.")), 2)
  end
  return setmetatable(values, {
    __index = unknown,
    __newindex = function(t, name, v)
      unknown(t, name)
      rawset(t, name, v)
    end,
  })
end

-- Resolves `argv` by the declaration `spec` (see lc.args) without ending the program; returns the values, or nil and
-- the help text when help was asked for. Usage errors are raised. `source` is the text in which the declaration stands.
function cli.parse(spec, argv, name, source)
  local options = declare(spec, source)
  local values, wish = resolve(options, argv)
  if wish == "help" then return nil, cli.help_text(options, name), options end
  return strict(values, options), nil, options
end

-- Declares a recipe's arguments and reads them from the command line.
--   lc.args {"what the recipe does", {"window", 64, "tokens that keep softmax attention"}, ...}
--   lc.args {"what the recipe does", window = {64, "tokens that keep softmax attention"}, ...}
-- A row is a name, a default, a help text and, if only some values are allowed, a list of them. The default gives the
-- type: number, boolean (--flag, --no-flag), string, or a list (--name a,b). lc.required as the default: must be given.
-- Further keys of a row: type, min, max, positional. A list of rows stands for its rows. --help prints all this and
-- ends; --config FILE.yaml is laid under the command line. Returns a table of the values; other names in it are errors.
function cli.args(spec)
  local script = cli.script or {}
  local argv = {}
  for i, word in ipairs(rawget(_G, "arg") or {}) do argv[i] = word end
  local values, help, options = cli.parse(spec, argv, script.name, script.source)
  if help then
    io.stdout:write(help, "\n")
    cli.exit(0)
  end
  local order, copy = {}, {}
  for i, option in ipairs(options) do
    order[i] = option.name
    copy[option.name] = values[option.name]
  end
  cli.current = {
    name = script.name, file = script.file, source = script.source, order = order, values = copy, argv = argv,
  }
  return values
end

-- What this run was asked to do, for its folder: {name=, file=, source=, order=, values=, argv=}; nil before lc.args.
function cli.args_of() return cli.current end

return cli
