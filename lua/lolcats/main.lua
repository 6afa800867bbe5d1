-- main.lua: the command line of the program: which script to run and how it ends. Called by runtime/program/main.c with
-- the words of the command line; returns the exit status (0, 1 error, 2 usage, 3 environment, 130 interrupted).
local program = require "lolcats.program"
local cli = require "lolcats.cli"

if os.getenv("LOLCATS_JIT") == "0" then
  jit.off()
else
  require("jit.opt").start("maxtrace=8000", "maxmcode=16384", "maxrecord=8000", "maxsnap=1000")
end

local usage = [[
Usage: lolcats                         an interactive session
       lolcats FILE.lua [--arg value]  run a script
       lolcats RECIPE [--arg value]    run one of the recipes below; --help tells its arguments
       lolcats -e CODE                 run code, or print an expression
       lolcats -                       run the script on standard input
       lolcats help NAME               what a function or an op does

  -i             stay in a session after the script
  --source NAME  print a recipe's text: lolcats --source chat > my_chat.lua
  --trust-code   run code that comes with a checkpoint
  --version, --help
]]

---- recipes --------------------------------------------------------------------------------------------------------------

-- {name=, path=} of every recipe, and the examples after them.
local function recipes()
  local list, seen = {}, {}
  for _, kind in ipairs {"recipes", "examples"} do
    for _, path in ipairs(program.files()) do
      local name = path:match("^" .. kind .. "/([%w_]+)%.lua$")
      if name and not seen[name] then
        seen[name] = true
        list[#list + 1] = {name = name, path = path, kind = kind}
      end
    end
  end
  return list
end

-- A script says in its first comment line what it does: "-- chat.lua: talk to a model."
local function first_line(text)
  local line = (text:gsub("^#![^\n]*\n", "")):match("^%-%-+%s*([^\n]*)") or ""
  line = line:gsub("^[%w_/]+%.lua:%s*", "")
  return #line > 90 and (line:match("^(.-)[%.;:]%s") or line:sub(1, 87) .. "...") or line
end

local function find_recipe(name)
  if not name:match("^[%w_]+$") then return nil end
  for _, kind in ipairs {"recipes", "examples"} do
    local path = kind .. "/" .. name .. ".lua"
    local text = program.source(path)
    if text then return {name = name, path = path, text = text} end
  end
end

local function print_help()
  io.stdout:write(usage)
  local title = {recipes = "\nRecipes:\n", examples = "\nExamples:\n"}
  local kind
  for _, recipe in ipairs(recipes()) do
    if recipe.kind ~= kind then
      kind = recipe.kind
      io.stdout:write(title[kind])
    end
    io.stdout:write(("  %-22s %s\n"):format(recipe.name, first_line(program.source(recipe.path) or "")))
  end
end

---- running --------------------------------------------------------------------------------------------------------------

local interrupt_meta = {__tostring = function(e) return e.message end}
program.on_interrupt(setmetatable({code = "EINTR", message = "interrupted"}, interrupt_meta))

-- The frames that the user wrote, innermost first.
local function user_frames(level)
  local frames = {}
  while #frames < 12 do
    local info = debug.getinfo(level, "Slnf")
    if not info then break end
    local own = info.source:find("^@lua/lolcats/") or info.source:find("^=lolcats") or info.what == "C"
    if not own and info.currentline and info.currentline >= 0 then
      local what = info.what == "main" and "main chunk"
        or info.name and ("%s '%s'"):format(info.namewhat ~= "" and info.namewhat or "function", info.name)
        or ("function <%d>"):format(info.linedefined)
      local file = info.source:match("^[@=](.*)") or info.short_src
      frames[#frames + 1] = ("  %s:%d: in %s"):format(file, info.currentline, what)
    end
    level = level + 1
  end
  return frames
end

local function handler(e)
  if type(e) == "table" and (e.exit or e.code == "EUSAGE" or e.code == "EINTR") then return {error = e} end
  if os.getenv("LOLCATS_TRACE") == "full" then
    return {error = e, trace = not (type(e) == "table" and e.traceback) and debug.traceback("", 2) or nil}
  end
  local frames = user_frames(3)
  -- one frame that the message already names says nothing new
  if #frames == 1 and tostring(e):find(frames[1]:match("^%s*(.-:%d+):") or "\0", 1, true) then frames = {} end
  return {error = e, trace = #frames > 0 and "\n" .. table.concat(frames, "\n") or nil}
end

-- Says what went wrong on stderr; returns the exit status.
local function report(caught, name)
  local e = caught.error
  local code = type(e) == "table" and e.code or nil
  local interrupted = program.interrupted()
  if type(e) == "table" and e.exit then return e.exit end
  io.stdout:flush()
  if code == "EINTR" or (interrupted and code == nil) then
    local train = package.loaded["lolcats.train"] -- a training run leaves its state behind
    local note = train and type(train) == "table" and train.interrupted()
    io.stderr:write("lolcats: interrupted", note and "; " .. note or "", "\n")
    return 130
  end
  if code == "EUSAGE" then
    io.stderr:write("lolcats", name and " " .. name or "", ": ", tostring(e), "\n")
    if name then io.stderr:write("Try: lolcats ", name, " --help\n") end
    return 2
  end
  io.stderr:write("lolcats: ", type(e) == "nil" and "error without a message" or tostring(e), "\n")
  if caught.trace then io.stderr:write("called from:", caught.trace, "\n") end
  if code == "EDEVICE" or code == "ENOMEM" or code == "EIO" then return 3 end
  return 1
end

-- Calls f; returns the status, having reported an error.
local function guard(name, f, ...)
  local n, args = select("#", ...), {...}
  local ok, caught = xpcall(function() return f(unpack(args, 1, n)) end, handler)
  if ok then return type(caught) == "number" and caught or 0 end
  if type(caught) ~= "table" then caught = {error = caught} end -- the handler itself failed: out of memory
  return report(caught, name)
end

-- Names of the global table and its strict rule: a name that nobody defined is a mistake.
local function near_global(name, env)
  local names = {}
  for _, t in ipairs {env, _G} do
    for k in pairs(t) do
      if type(k) == "string" then names[#names + 1] = k end
    end
  end
  local near = cli.suggest(tostring(name), names)
  return near and ("; did you mean '%s'?"):format(near) or ""
end

local function undefined(env, name)
  local hint = near_global(name, env)
  if name == "lc" then hint = '; write: local lc = require "lolcats"' end
  error(("undefined variable '%s'%s"):format(tostring(name), hint), 3)
end

local function make_strict()
  setmetatable(_G, {
    __index = function(_, name) undefined(_G, name) end,
    __newindex = function(_, name)
      error(("assignment to the undefined variable '%s'; write: local %s"):format(tostring(name), tostring(name)), 2)
    end,
  })
end

-- The environment of a session and of -e: new names may be made, unknown ones are still errors.
local session
local function session_env()
  if session then return session end
  local known = {}
  local env = setmetatable({}, {__index = function(t, name)
    local v = rawget(_G, name)
    if v ~= nil then return v end
    if name == "lc" then
      t.lc = require "lolcats"
      return t.lc
    end
    if not known[name] then undefined(t, name) end
  end, __newindex = function(t, name, v) -- `local x` without a value is known, though nil
    known[name] = true
    rawset(t, name, v)
  end})
  session = env
  return env
end

-- A "# language" line is for the shell.
local function load_text(text, chunk)
  local f, why = loadstring((text:gsub("^#[^\n]*", "", 1)), chunk)
  if not f then
    local repl = require "lolcats.repl"
    cli.syntax_error(repl.explain_syntax(why, text))
  end
  return f
end

function cli.syntax_error(why)
  error(setmetatable({code = "ESYNTAX", message = why}, {__tostring = function(e) return e.message end}), 0)
end

local function set_script(name, file, text, words)
  cli.script = {name = name, file = file, source = text}
  local list = {[0] = file}
  for i, word in ipairs(words) do list[i] = word end
  rawset(_G, "arg", list)
end

local function run_text(text, chunk, words, in_session)
  if cli.trust_code then rawset(require "lolcats", "trust_code", true) end
  if in_session then
    local repl = require "lolcats.repl"
    local f = setfenv(load_text(repl.keep_locals(text), chunk), session_env())
    return f(unpack(words))
  end
  local f = load_text(text, chunk)
  make_strict()
  f(unpack(words))
end

local function read_all(path)
  local file, why = io.open(path, "rb")
  if not file then cli.usage("%s", why) end
  local text = file:read("*a")
  file:close()
  if not text then cli.usage("%s: cannot be read (is it a folder?)", path) end
  if text:sub(1, 3) == "\239\187\191" then text = text:sub(4) end
  return text
end

local function run_file(path, words, stay)
  local text = read_all(path)
  if text:byte(1) == 27 then cli.usage("%s: is compiled bytecode; a Lua source file was expected", path) end
  local folder = path:match("^(.*)/[^/]*$")
  if folder then package.path = folder .. "/?.lua;" .. package.path end
  set_script(path, path, text, words)
  run_text(text, "@" .. path, words, stay)
end

local function unknown_recipe(name)
  local names = {}
  for i, recipe in ipairs(recipes()) do names[i] = recipe.name end
  names[#names + 1] = "help"
  local near = cli.suggest(name, names)
  local hint = near and ("; did you mean '%s'?"):format(near) or "; lolcats --help lists the recipes"
  local file = io.open(name, "rb")
  if file then
    file:close()
    hint = ("; to run the file, write ./%s"):format(name)
  end
  cli.usage("there is no recipe '%s'%s", name, hint)
end

-- A script by the name on the command line.
local function run_named(name, words, stay)
  if name == "-" then
    local text = io.read("*a")
    set_script("-", "stdin", text, words)
    return run_text(text, "=stdin", words, stay)
  end
  if name:find("/", 1, true) or name:match("%.lua$") then return run_file(name, words, stay) end
  if name == "help" then
    io.stdout:write(require("lolcats.help").text(words[1]), "\n")
    return
  end
  local recipe = find_recipe(name)
  if not recipe then unknown_recipe(name) end
  set_script(name, recipe.path, recipe.text, words)
  run_text(recipe.text, "@" .. recipe.path, words, stay)
end

-- -e: an expression is printed, a statement run.
local function run_code(code, words)
  set_script("-e", "-e", code, words)
  local repl = require "lolcats.repl"
  repl.evaluate(code, "=-e", session_env())
end

---- the command line -----------------------------------------------------------------------------------------------------

local function parse(words)
  local opts = {code = {}, words = {}}
  local i = 1
  local flags = {"--help", "--version", "--source", "--trust-code", "-e", "-i"}
  while i <= #words do
    local word = words[i]
    if word == "-" or not word:match("^%-") then break end
    if word == "--help" or word == "-h" then opts.help = true
    elseif word == "--version" or word == "-v" or word == "-V" then opts.version = true
    elseif word == "-i" then opts.stay = true
    elseif word == "--trust-code" then cli.trust()
    elseif word == "-e" then
      i = i + 1
      opts.code[#opts.code + 1] = words[i] or cli.usage("-e needs code")
    elseif word:match("^%-%-source") then
      opts.source = word:match("^%-%-source=(.*)$")
      if not opts.source then
        i = i + 1
        opts.source = words[i] or cli.usage("--source needs a recipe's name")
      end
    elseif word == "--" then
      i = i + 1
      break
    else
      local near = cli.suggest(word, flags)
      cli.usage("unknown option %s%s (options of a script stand after its name)", word,
        near and ("; did you mean %s?"):format(near) or "")
    end
    i = i + 1
  end
  if i <= #words and #opts.code == 0 then
    opts.script = words[i]
    i = i + 1
  end
  while i <= #words do
    opts.words[#opts.words + 1] = words[i]
    i = i + 1
  end
  return opts
end

local function start_session(stay)
  return guard(nil, function() return require("lolcats.repl").run(session_env(), {greet = not stay}) end)
end

return function(...)
  local words, opts = {...}, nil
  local status = guard(nil, function() opts = parse(words) end)
  if status ~= 0 then
    io.stderr:write("Try: lolcats --help\n")
    return status
  end
  if opts.help then
    print_help()
    return 0
  elseif opts.version then
    io.stdout:write(("lolcats %s (%s)\n"):format(program.version, jit.version))
    return 0
  elseif opts.source then
    return guard(nil, function()
      local recipe = find_recipe((opts.source:gsub("%.lua$", ""):gsub("^recipes/", "")))
      local text = recipe and recipe.text or program.source(opts.source)
        or program.source("lua/lolcats/" .. opts.source .. ".lua")
      if not text then unknown_recipe(opts.source) end
      io.stdout:write(text)
    end)
  end
  for _, code in ipairs(opts.code) do
    status = guard(nil, run_code, code, opts.words)
    if status ~= 0 then break end
  end
  if opts.script then
    local name = opts.script
    if name:find("/", 1, true) == nil and not name:match("%.lua$") and not find_recipe(name) then name = nil end
    status = guard(name or opts.script:match("%.lua$"), run_named, opts.script, opts.words, opts.stay)
  end
  if (not opts.script and #opts.code == 0) or opts.stay then
    local last = start_session(opts.stay)
    if status == 0 then status = last end
  end
  return status
end
