-- test_repl.lua: the interactive session, through a pipe (plain lines) and, where there are pseudo-terminals, through
-- a terminal; and its parts: the lexer, kept locals, completion, printing, help.
local t = dofile(((arg and arg[0] or ""):match("^(.*/)") or "") .. "harness.lua")
local repl = require "lolcats.repl"
local lexer = require "lolcats.lexer"
local complete = require "lolcats.complete"
local help = require "lolcats.help"
local program = require "lolcats.program"
local lc = require "lolcats"

local folder = os.tmpname()
os.remove(folder)
assert(program.make_dirs(folder))

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end
local function write(name, text)
  local file = assert(io.open(folder .. "/" .. name, "wb"))
  file:write(text)
  file:close()
  return folder .. "/" .. name
end

-- What a session prints (stdout, stderr) for these lines, and its exit status.
local function session(...)
  local input = write("in", table.concat({...}, "\n") .. "\n")
  local pipe = io.popen(("%s <%s 2>%s; echo \"=$?\""):format(quote(program.path), quote(input), quote(folder .. "/err")))
  local out, status = pipe:read("*a"):match("^(.*)=(%d+)\n$")
  pipe:close()
  local file = io.open(folder .. "/err")
  local err = file:read("*a")
  file:close()
  return out, err, tonumber(status)
end

---- parts ----------------------------------------------------------------------------------------------------------------

t.test("the lexer", function()
  local words = {}
  for _, token in ipairs(lexer.tokens("local s = [==[ local ]] ]==] -- local\n--[[ local\n]] x='a\\'b' .. \"c\" ...~=1e-3")) do
    words[#words + 1] = token.text
  end
  t.eq(table.concat(words, "|"), "local|s|=|[==[ local ]] ]==]|x|=|'a\\'b'|..|\"c\"|...|~=|1e|-|3")
  t.eq(lexer.tokens("x = 'abc")[3].open, true)
  t.eq(lexer.tokens("x = [[abc")[3].open, true)
end)

t.test("top-level locals are kept", function()
  local cases = {
    {"local x = 1", " x = 1"},
    {"local x", " x = nil"},
    {"local a, b", " a, b = nil"},
    {"local a, b = f()", " a, b = f()"},
    {"local function f() local y = 1 return y end", " function f() local y = 1 return y end"},
    {"do local x = 1 end", "do local x = 1 end"},
    {"for i = 1, 2 do local x = i end local z = 3", "for i = 1, 2 do local x = i end  z = 3"},
    {"if a then local x elseif b then local y end", "if a then local x elseif b then local y end"},
    {"repeat local x until x; local y", "repeat local x until x;  y = nil"},
    {"while f() do local x end", "while f() do local x end"},
    {"s = 'local x' -- local y", "s = 'local x' -- local y"},
    {"local x -- c\nlocal y = 2", " x = nil -- c\n y = 2"},
    {"local f = function() local q = 1 end", " f = function() local q = 1 end"},
  }
  for _, case in ipairs(cases) do t.eq(repl.keep_locals(case[1]), case[2]) end
end)

t.test("values as text", function()
  t.eq(repl.show("a\nb"), "a\nb")
  t.eq(repl.show({1, "x", a = true}), '{1, "x", a = true}')
  t.eq(repl.show({}), "{}")
  t.eq(repl.show({["b c"] = 1, [2.5] = 2}), '{[2.5] = 2, ["b c"] = 1}')
  local loop = {}
  loop.me = loop
  t.eq(repl.show(loop), "{me = {...}}")
  local long = {}
  for i = 1, 100 do long[i] = i end
  t.ok(repl.show(long):find("... 60 more", 1, true))
  t.ok(repl.show({lc.zeros(2, 3)}):find("f32%[2 x 3%]"))
end)

local function offered(text, env)
  local list = complete.candidates(text, env or {})
  local set = {}
  for _, name in ipairs(list) do set[name] = true end
  return set, list
end

t.test("completion", function()
  local env = setmetatable({model = {layers = {{self_attn = {q_proj = 1, forward = print}}}}, x = lc.zeros(2)}, {__index = _G})
  t.ok(offered("string.for", env)["format"])
  t.ok(offered("mod", env)["model"])
  t.ok(offered("y = model.la", env)["layers"])
  local set = offered("model.layers[1].self_attn.", env)
  t.ok(set.q_proj and set.forward)
  set = offered("model.layers[1].self_attn:", env)
  t.ok(set.forward and not set.q_proj)
  t.ok(offered("x:soft", env)["softmax"] and offered("x:resh", env)["reshape"])
  t.ok(offered("x.sha", env)["shape"] and not offered("x:sha", env)["shape"])
  t.ok(offered("?soft", env)["softmax"] and offered("?lineari", env)["linearize"] and offered("lc.lineari", env)["linearize"])
  t.ok(offered(":he", env)["help"])
  t.ok(offered("whi", env)["while"])
  t.eq(#select(2, offered("nothing.here", env)), 0)
  write("file_one.txt", "")
  t.ok(offered("f('" .. folder .. "/file_o", env)["file_one.txt"])
  env.xmodel = 1
  t.eq(complete.line("xmo", env), "del")
  local insert, list = complete.line("x:softm", env)
  t.eq(insert, "ax")
  t.eq(list, nil)
end)

t.test("help", function()
  t.ok(help.text("softmax"):find("softmax(x, dim=-1)", 1, true))
  t.ok(help.text("lc.args"):find("Declares a recipe's arguments", 1, true))
  t.ok(help.text("scope"):find("lua/lolcats/core/scope.lua", 1, true))
  t.ok(help.text("sofmax"):find("did you mean 'softmax'?", 1, true))
  t.ok(help.text("doctor"):find("what was found", 1, true) or help.text("doctor"):find("Prints the report", 1, true))
  t.ok(help.text():find("lolcats --help", 1, true))
end)

t.test("hints for habits from elsewhere", function()
  for _, case in ipairs {
    {"x @ x", "x:matmul(y)"}, {"x != 1", "~="}, {"x += 1", "x = x + 1"}, {"a && b", "'and'"}, {"a || b", "'or'"}, {"x ** 2", "x ^ 2"},
    {"x[1:2]", "x:slice"},
  } do
    local _, why = loadstring(case[1])
    t.ok(repl.explain_syntax(why, case[1]):find(case[2], 1, true), case[1] .. ": " .. repl.explain_syntax(why, case[1]))
  end
end)

---- through a pipe -------------------------------------------------------------------------------------------------------

t.test("expressions are printed, statements are not, _ is the last value", function()
  local out, err, status = session("1 + 1", "_ * 10", "x = 5", "x, 'two'", "print 'p'", "nil", "(function() end)()")
  t.eq(out, "2\n20\n5\ttwo\np\nnil\n")
  t.eq(err, "")
  t.eq(status, 0)
end)

t.test("locals are kept, input goes on over lines", function()
  local out, err = session("local a, b = 2, 3", "local c", "a * b", "c", "local function f(n)", "  return n * a", "end", "f(21)",
    "for i = 1, 2 do", "print(i)", "end", "s = [[one", "two]]", "s")
  t.eq(out, "6\nnil\n42\n1\n2\none\ntwo\n")
  t.eq(err, "")
end)

t.test("errors do not end the session", function()
  local out, err, status = session("error 'no'", "x:matmul(3)", "prnt(1)", "x @ x", "lc.zeros(2, 3):matmul(lc.zeros(7, 2))", "error {}",
    "error()", "lc.zeros(2):nothing() -- c", "lc.lineraize", "lc.scope(function() lc.zeros(2) error('inside') end)", "1 + 1")
  t.eq(out, "2\n")
  t.eq(status, 0)
  for _, part in ipairs {
    "stdin:1: no", "undefined variable 'x'", "did you mean 'print'?", "x:matmul(y)", "stdin:1: matmul: inner dims differ", "f32[7 x 2]", "inside", "stdin:1: lc has no",
  } do
    t.ok(err:find(part, 1, true), part .. " in\n" .. err)
  end
end)

t.test("an unfinished statement at the end", function()
  local _, err, status = session("x = {")
  t.ok(err:find("ended inside a statement", 1, true))
  t.eq(status, 0)
end)

t.test("commands", function()
  local file = write("l.lua", "local answer = 42\nfunction twice(n) return 2 * n end\n")
  local out, err = session("?softmax", ":help rope", ":time 1 + 1", ":mem", "v = 3", ":who", ":source doctor", ":load " .. file, "twice(answer)",
    ":hlep", ":load nothing.lua")
  for _, part in ipairs {"softmax(x, dim=-1)", "rope(x, cos, sin", "tensors", "peak of the process", "v ", "lc.doctor()", "84\n"} do
    t.ok(out:find(part, 1, true), part .. " in\n" .. out)
  end
  t.ok(out:find("%d+%.?%d* [um]?s\n"), out)
  t.ok(err:find("did you mean :help?", 1, true), err)
  t.ok(err:find("nothing.lua", 1, true), err)
  local _, _, status = session(":quit", "error 'not reached'")
  t.eq(status, 0)
end)

t.test("-i keeps a script's locals", function()
  local path = write("k.lua", "local lc = require 'lolcats'\nlocal x = lc.full({2}, 3)\nlocal function f() return x:sum():item() end\n")
  local input = write("in2", "f()\nx.shape[1]\n")
  local pipe = io.popen(("%s -i %s <%s 2>&1"):format(quote(program.path), quote(path), quote(input)))
  t.eq(pipe:read("*a"), "6\n2\n")
  pipe:close()
end)

t.test("tensors print", function()
  local out, err = session("lc.zeros(2, 2)", "lc.full({}, 7)", "x = lc.arange(3)", "x:sum():item()")
  t.ok(out:find("f32[2 x 2] cpu", 1, true), out .. err)
  t.ok(out:find("\n3\n$"), out .. err)
end)

---- through a terminal ---------------------------------------------------------------------------------------------------

-- A session on a terminal of its own (tests/c/terminal.c), step by step: {"expect", text} or {"type", text}, where text is what the
-- screen has to show before the next step, or what is typed. Returns whether all was seen, and the screen.
local tool = (os.getenv "LOLCATS_TEST_BUILD" or "build") .. "/tests/c_terminal"
local function terminal(steps)
  local lines = {}
  for i, s in ipairs(steps) do
    lines[i] = s[1] .. " " .. s[2]:gsub("\\", "\\\\"):gsub("%c", function(c) return ("\\x%02x"):format(c:byte()) end)
  end
  local path = write("type.txt", table.concat(lines, "\n") .. "\n")
  local pipe = io.popen(("XDG_STATE_HOME=%s TERM=xterm LC_ALL=C %s %s %s 2>&1; echo \"=$?\""):format(
    quote(folder), quote(tool), quote(path), quote(program.path)))
  local text, status = pipe:read("*a"):match("^(.*)=(%d+)\n$")
  pipe:close()
  return tonumber(status), text
end

local ready, why = terminal {{"expect", "> "}, {"type", ":quit\r"}}
if ready == 77 or ready == 127 then
  t.skip("a session on a terminal", ready == 77 and why:gsub("\n", "") or tool .. " was not built")
else
  t.test("a terminal: prompt, editing, completion, Ctrl-C, history", function()
    local status, text = terminal {
      {"expect", "lolcats " .. program.version}, {"expect", ":help  :quit"}, {"expect", "\n> "},
      {"type", "x = 20 + 1\r"}, {"expect", "\n> "},
      {"type", "strin\t.rep\t('ab', 2)\r"}, {"expect", "\nabab\r\n"}, {"expect", "> "},
      {"type", "do print('lo' .. 'op') while true do end end\r"}, {"expect", "\nloop\r\n"}, {"type", "\3"},
      {"expect", "interrupted\r\n"}, {"expect", "> "},
      {"type", "lc.zeros(3):si"}, {"expect", "):si"}, {"type", "\3"}, {"expect", "\n> "},
      {"type", "print(x * 2)\r"}, {"expect", "\n42\r\n"}, {"expect", "> "},
      {"type", "#'h\195\169' * 100\r"}, {"expect", "\n300\r\n"}, {"expect", "> "}, -- a character of two bytes
      {"type", ":quit\r"},
    }
    t.eq(status, 0, text)
    t.ok(text:find("status=0\n", 1, true), text)
    local file = assert(io.open(folder .. "/lolcats/history"), "a history file")
    local history = file:read("*a")
    file:close()
    t.ok(history:find("print(x\\040*\\0402)", 1, true) or history:find("print(x * 2)", 1, true), history)
    -- up, up, up: past :quit and #
    status, text = terminal {{"expect", "\n> "}, {"type", "\27[A\27[A\27[A"}, {"expect", "print(x * 2)"}, {"type", "\r"}, {"expect", "'x'"},
      {"expect", "> "}, {"type", "\4"}}
    t.eq(status, 0, text)
    t.ok(text:find("status=0\n", 1, true), text)
  end)
end

os.execute("rm -rf " .. quote(folder))
t.finish()
