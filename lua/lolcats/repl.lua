-- repl.lua: the interactive session: reads lines (by libedit on a terminal, plainly otherwise), prints expressions,
-- keeps top-level locals, completes names, answers ?name and :commands. An error or Ctrl-C ends the line, never the
-- session.
local program = require "lolcats.program"
local cli = require "lolcats.cli"
local lexer = require "lolcats.lexer"
local repl = {}

---- syntax ---------------------------------------------------------------------------------------------------------------

-- What people write who come from other languages, by the token that LuaJIT stumbles over.
local hints = {
  {"near '@'", "a matrix product is x:matmul(y); * is elementwise"},
  {"near '!'", "'not equal' is ~=, 'not' is spelled out"},
  {"near '&'", "'and' is spelled out"},
  {"near '|'", "'or' is spelled out"},
  {"near '%+'", "there is no += and no ++: write x = x + 1", "%+[=%+]"},
  {"near '='", "there is no += and no ++: write x = x + 1", "[%+%-%*/%^]="},
  {"near '='", "a comparison is ==", "^%s*if%f[%W]"},
  {"near '%*'", "a power is x ^ 2", "%*%*"},
  {"near '/'", "a comment starts with --", "//"},
  {"near '#'", "a comment starts with --", "#%s"},
  {"near '{'", "a table is {1, 2, 3}; a block is do ... end"},
  {"near ':'", "slices are x:slice(dim, first, last) or x[{ {first, last} }]", "%["},
  {"near '%['", "a nested list is a table: lc.tensor {{1, 2}, {3, 4}}", "%[%["},
}

-- A syntax error, with a hint if the text shows a habit of another language.
function repl.explain_syntax(why, text)
  local number = tonumber(why:match(":(%d+):"))
  local line, n = text, 0
  for l in (text .. "\n"):gmatch("([^\n]*)\n") do
    n = n + 1
    if n == number then line = l end
  end
  for _, h in ipairs(hints) do
    if why:find(h[1]) and (not h[3] or line:find(h[3])) then return why .. "\n  hint: " .. h[2] end
  end
  return why
end

-- `local` at the outermost level of a session becomes a variable of the session: Lua would forget it at the end of the
-- line.
function repl.keep_locals(text)
  local out, from, depth = {}, 1, 0
  local tokens = lexer.tokens(text)
  for i, t in ipairs(tokens) do
    if t.kind == "word" then
      depth = depth + (lexer.depth[t.text] or 0)
      if t.text == "local" and depth == 0 then
        out[#out + 1] = text:sub(from, t.first - 1)
        from = t.last + 1
        local after = tokens[i + 1]
        if not after or after.text ~= "function" then
          local j = i + 1
          while tokens[j + 1] and tokens[j + 1].text == "," do j = j + 2 end
          if tokens[j] and not (tokens[j + 1] and tokens[j + 1].text == "=") then
            out[#out + 1] = text:sub(from, tokens[j].last) .. " = nil"
            from = tokens[j].last + 1
          end
        end
      end
    end
  end
  return table.concat(out) .. text:sub(from)
end

local function pack(...) return {n = select("#", ...), ...} end

-- The chunk for a line of a session: f and whether it is an expression, whose values f returns packed; or nil, why, and
-- whether more lines may mend it. No tail call: an error's place would be lost with the frame.
local function compile(text, chunk)
  local f, why = loadstring("return " .. text, chunk)
  if f then
    local close = text:find("--", 1, true) and "\n)" or ")" -- a comment must end, else all stays on its line
    f = loadstring("local values = __pack(" .. text .. close .. " return values", chunk)
    if f then return f, true end
  end
  f, why = loadstring(repl.keep_locals(text), chunk)
  if f then return f, false end
  return nil, why, why:find("near '<eof>'", 1, true) ~= nil
end

---- printing -------------------------------------------------------------------------------------------------------------

local function key_text(k)
  if type(k) == "string" and k:match("^[%a_][%w_]*$") then return k end
  return "[" .. (type(k) == "string" and ("%q"):format(k) or tostring(k)) .. "]"
end

local function order(a, b)
  if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then return a < b end
  return type(a) < type(b)
end

local limits = {entries = 40, depth = 3, text = 200}

-- A value as text: strings bare at the outermost level, tables with their first entries.
function repl.show(v, depth, seen)
  depth, seen = depth or 0, seen or {}
  if type(v) == "string" then
    if depth == 0 then return v end
    return (("%q"):format(#v > limits.text and v:sub(1, limits.text) .. "..." or v):gsub("\\\n", "\\n"))
  end
  if type(v) == "cdata" and depth > 0 then return (tostring(v):match("^[^\n]*")) end
  local meta = type(v) == "table" and getmetatable(v)
  if type(v) ~= "table" or (type(meta) == "table" and rawget(meta, "__tostring")) then return tostring(v) end
  if seen[v] then return "{...}" end
  if next(v) == nil then return "{}" end
  if depth >= limits.depth then return "{...}" end
  seen[v] = true
  local parts, keys = {}, {}
  for i = 1, math.min(#v, limits.entries) do parts[i] = repl.show(rawget(v, i), depth + 1, seen) end
  local more = #v - #parts
  for k in next, v do
    if not (type(k) == "number" and k >= 1 and k <= #v and k % 1 == 0) then keys[#keys + 1] = k end
  end
  table.sort(keys, order)
  for i, k in ipairs(keys) do
    if #parts >= limits.entries then
      more = more + #keys - i + 1
      break
    end
    parts[#parts + 1] = key_text(k) .. " = " .. repl.show(rawget(v, k), depth + 1, seen)
  end
  if more > 0 then parts[#parts + 1] = ("... %d more"):format(more) end
  seen[v] = nil
  local flat = "{" .. table.concat(parts, ", ") .. "}"
  if #flat <= 100 and not flat:find("\n") then return flat end
  local pad = ("  "):rep(depth + 1)
  return "{\n" .. pad .. table.concat(parts, ",\n" .. pad) .. "\n" .. ("  "):rep(depth) .. "}"
end

local function print_values(n, values)
  local parts, long = {}, false
  for i = 1, n do
    parts[i] = repl.show(values[i])
    long = long or parts[i]:find("\n") ~= nil
  end
  if n > 0 then io.stdout:write(table.concat(parts, long and "\n" or "\t"), "\n") end
end

---- evaluation -----------------------------------------------------------------------------------------------------------

local function run_chunk(f, is_expression, env)
  rawset(_G, "__pack", pack)
  local values = setfenv(f, env)()
  if is_expression then
    if values.n > 0 then rawset(env, "_", values[1]) end
    print_values(values.n, values)
  end
end

-- Runs code as a line of a session would be, raising its errors: for -e.
function repl.evaluate(text, chunk, env)
  local f, how = compile(text, chunk)
  if not f then cli.syntax_error(repl.explain_syntax(how, text)) end
  run_chunk(f, how, env)
end

local trace_all = os.getenv("LOLCATS_TRACE") == "full"

-- The error with its way there: only frames beyond the line itself are worth a line.
local function with_trace(e)
  if type(e) == "table" and (e.exit or e.code == "EINTR") then return e end
  if trace_all then
    if type(e) == "table" and e.traceback then return e end
    return tostring(e) .. "\n" .. debug.traceback("", 2)
  end
  return e
end

-- After an error: scopes that nobody closed are closed, gradients are recorded, a Ctrl-C that did its work is
-- forgotten.
local function recover()
  program.interrupted()
  if program.drop_scopes() > 0 then
    local bridge = package.loaded["lolcats.core.ffi"]
    if bridge then bridge.depth[0] = 0 end
  end
  program.grad_mode(true)
end
repl.recover = recover

-- Runs f protected; says what went wrong. Returns the exit status if the code asked to leave.
local function guarded(f)
  local ok, e = xpcall(f, with_trace)
  if ok then return end
  recover()
  io.stdout:flush()
  if type(e) == "table" and e.exit then return e.exit end
  if type(e) == "table" and e.code == "EINTR" then
    io.stderr:write("  interrupted\n")
    return
  end
  local text = type(e) == "string" and e or repl.show(e)
  io.stderr:write("  ", (text:gsub("\n", "\n  ")), "\n")
end

---- commands -------------------------------------------------------------------------------------------------------------

local commands = {}
local command_help = {
  {":help [NAME], ?NAME", "what an op, a function or a value is"},
  {":time CODE", "run it and say how long it took"},
  {":mem", "memory of tensors, by device"},
  {":who", "the session's variables"},
  {":source NAME", "the text of a recipe or of a module of the library"},
  {":load FILE", "run a file in the session, keeping its locals"},
  {":trace", "full tracebacks on or off"},
  {":quit", "leave (Ctrl-D too)"},
}

function commands.help(rest, env)
  local help = require "lolcats.help"
  if rest ~= "" then return io.stdout:write(help.text(rest, env), "\n") end
  io.stdout:write(help.text(nil), "\n\n")
  for _, row in ipairs(command_help) do io.stdout:write(("  %-22s %s\n"):format(row[1], row[2])) end
end

function commands.time(rest, env)
  local f, how = compile(rest, "=stdin")
  if not f then cli.syntax_error(repl.explain_syntax(how, rest)) end
  local clock = require("lolcats").now
  local start = clock()
  run_chunk(f, how, env)
  local t = clock() - start
  local unit, scale = "s", 1
  if t < 1e-3 then unit, scale = "us", 1e6 elseif t < 1 then unit, scale = "ms", 1e3 end
  io.stdout:write(("  %.4g %s\n"):format(t * scale, unit))
end

function commands.mem()
  local lc = require "lolcats"
  collectgarbage()
  for _, device in ipairs(lc.devices()) do
    local m = lc.memory(nil, device.name)
    io.stdout:write(("  %-8s tensors %.1f MB, cached %.1f MB, peak %.1f MB\n"):format(
      device.name, m.live / 2 ^ 20, m.cached / 2 ^ 20, m.peak / 2 ^ 20))
  end
  io.stdout:write(("  %-8s %.1f MB; peak of the process %.1f MB\n"):format(
    "Lua", collectgarbage "count" / 1024, lc.peak_rss() / 2 ^ 20))
end

function commands.who(_, env)
  local names = {}
  for name in pairs(env) do
    if type(name) == "string" and name ~= "lc" and name ~= "_" then names[#names + 1] = name end
  end
  table.sort(names)
  for _, name in ipairs(names) do
    io.stdout:write(("  %-12s %s\n"):format(name, (repl.show(env[name], 1):match("^[^\n]*"):sub(1, 90))))
  end
end

function commands.source(rest)
  local name = rest:gsub("%.lua$", "")
  local text = program.source("recipes/" .. name .. ".lua") or program.source("examples/" .. name .. ".lua")
    or program.source("lua/lolcats/" .. name:gsub("^lolcats%.", ""):gsub("%.", "/") .. ".lua")
    or program.source(rest)
  if not text then
    local names = {}
    for i, path in ipairs(program.files()) do names[i] = path:match("([%w_]+)%.%w+$") or path end
    local near = cli.suggest(name, names)
    cli.usage("no recipe or module is called '%s'%s", rest, near and ("; did you mean '%s'?"):format(near) or "")
  end
  io.stdout:write(text)
end

function commands.load(rest, env)
  local file, why = io.open(rest, "rb")
  if not file then cli.usage("%s", why) end
  local text = file:read("*a") or ""
  file:close()
  local f, message = loadstring(repl.keep_locals((text:gsub("^#[^\n]*", "", 1))), "@" .. rest)
  if not f then cli.syntax_error(repl.explain_syntax(message, text)) end
  setfenv(f, env)()
end

function commands.trace()
  trace_all = not trace_all
  io.stdout:write(trace_all and "  full tracebacks\n" or "  short errors\n")
end

function commands.quit() cli.exit(0) end
commands.q, commands.exit = commands.quit, commands.quit

local function run_command(line, env)
  local name, rest = line:match("^:(%w+)%s*(.-)%s*$")
  local command = name and commands[name]
  if not command then
    local names = {}
    for k in pairs(commands) do names[#names + 1] = k end
    local near = name and cli.suggest(name, names)
    cli.usage("unknown command %s%s", line:match("^%S+"),
      near and ("; did you mean :%s?"):format(near) or "; :help lists them")
  end
  command(rest, env)
end

---- the loop -------------------------------------------------------------------------------------------------------------

local function history_file()
  local state = os.getenv("XDG_STATE_HOME")
  if not state or state == "" then
    local home = os.getenv("HOME")
    if not home or home == "" then return nil end
    state = home .. "/.local/state"
  end
  return program.make_dirs(state .. "/lolcats") and state .. "/lolcats/history" or nil
end

-- Returns read(prompt) -> line, nil at the end, false after Ctrl-C.
local function line_source(env)
  if not (program.is_terminal(0) and program.is_terminal(1)) or os.getenv("TERM") == "dumb" then
    local prompting = program.is_terminal(0)
    return function(prompt)
      if prompting then io.stdout:write(prompt) end
      io.stdout:flush()
      local line = io.read("*l")
      if line == nil and program.interrupted() then return prompting and false or nil end
      return line
    end
  end
  local path = history_file()
  if path then program.history_open(path) end
  local complete = require "lolcats.complete"
  local told = false
  return function(prompt)
    io.stdout:flush()
    local line = program.read_line(prompt, function(text) return complete.line(text, env) end)
    local why = line and line:match("%S") and program.history_add(line)
    if why and not told then
      told = true
      io.stderr:write("  the history is not saved: ", why, "\n")
    end
    return line
  end
end

local function greet()
  local ok, line = pcall(function() return require("lolcats.doctor").line() end)
  io.stdout:write(("lolcats %s  %s     :help  :quit\n"):format(program.version, ok and line or jit.version))
end

-- One whole input (perhaps of several lines): a command, ?name, an expression or statements. Returns an exit status to
-- leave.
local function take(text, f, is_expression, env)
  if text:match("^%s*:%a") then return guarded(function() run_command(text:match("^%s*(.-)%s*$"), env) end) end
  if text:match("^%s*%?") then
    return guarded(function() commands.help(text:match("^%s*%?%s*(.-)%s*$"), env) end)
  end
  -- LuaJIT asks for Ctrl-C in interpreted code only; the line itself is not worth compiling, what it calls is.
  jit.off(f)
  return guarded(function() run_chunk(f, is_expression, env) end)
end

-- Runs a session in `env` until the input ends; returns the exit status.
function repl.run(env, opts)
  local read = line_source(env)
  if program.is_terminal(0) and opts and opts.greet then greet() end
  if env.lc == nil then error("the session has no lc") end
  local pending
  while true do
    local line = read(pending and ".. " or "> ")
    if line == false then -- Ctrl-C: a fresh line
      pending = nil
    elseif line == nil then
      if pending then io.stderr:write("  the input ended inside a statement\n") end
      if program.is_terminal(0) then io.stdout:write("\n") end
      return 0
    else
      local text = pending and pending .. "\n" .. line or line
      local status
      if not pending and (text:match("^%s*:%a") or text:match("^%s*%?")) then
        status = take(text, nil, nil, env)
      elseif text:match("%S") then
        local f, how, unfinished = compile(text, "=stdin")
        if f then
          pending = nil
          status = take(text, f, how, env)
        elseif unfinished then
          pending = text
        else
          pending = nil
          io.stdout:flush()
          io.stderr:write("  ", (repl.explain_syntax(how, text):gsub("\n", "\n  ")), "\n")
        end
      end
      if status then return status end
    end
  end
end

return repl
