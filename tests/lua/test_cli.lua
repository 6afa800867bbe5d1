-- test_cli.lua: the command line: arguments of recipes, exit statuses, messages with suggestions, strict globals,
-- interruption.
local t = dofile(((arg and arg[0] or ""):match("^(.*/)") or "") .. "harness.lua")
local cli = require "lolcats.cli"
local program = require "lolcats.program"

local folder = os.tmpname()
os.remove(folder)
assert(program.make_dirs(folder))

local function write(name, text)
  local path = folder .. "/" .. name
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
  return path
end

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

-- Runs the program; returns its output (stdout and stderr together) and its exit status.
local function run(words, input)
  local command = {quote(program.path)}
  for _, word in ipairs(words) do command[#command + 1] = quote(word) end
  local from = input and write("stdin", input) or "/dev/null"
  local pipe = assert(io.popen(table.concat(command, " ") .. " <" .. quote(from) .. " 2>&1; echo \"=$?\""))
  local text = pipe:read("*a")
  pipe:close()
  local out, status = text:match("^(.*)=(%d+)\n$")
  return out, tonumber(status)
end

local function expect(words, status, ...)
  local out, got = run(words)
  t.eq(got, status, out)
  for _, part in ipairs {...} do t.ok(out:find(part, 1, true), ("%q expected in:\n%s"):format(part, out)) end
  return out
end

---- lc.args --------------------------------------------------------------------------------------------------------------

local spec = {
  "What it does.",
  {"model", "smollm2", "a model"},
  {"window", 64, "tokens", min = 1},
  {"map", "hedgehog", "feature map", {"hedgehog", "t2r"}},
  {"fresh", false, "start over"},
  {"chart", true, "draw"},
  {"targets", {"q", "k"}, "names"},
  {"sizes", {1, 2}, "numbers"},
  {"lr_min", 1e-4, "rate"},
}

local function parse(...) return cli.parse(spec, {...}, "demo") end

local function refused(message, ...)
  local words = {...}
  local e = t.errors(function() parse(unpack(words)) end, "")
  t.eq(e.code, "EUSAGE")
  t.eq(e.message, message)
end

t.test("defaults", function()
  local a = parse()
  t.eq({a.model, a.window, a.map, a.fresh, a.chart, a.targets, a.sizes, a.lr_min},
    {"smollm2", 64, "hedgehog", false, true, {"q", "k"}, {1, 2}, 1e-4})
end)

t.test("values in every spelling", function()
  local a = parse("--window", "8", "--model=x=y", "--fresh", "--no-chart", "--targets", "a,b", "--targets=c", "--lr-min", "-3e-5",
    "--sizes", "4", "--map", "t2r")
  t.eq({a.model, a.window, a.map, a.fresh, a.chart, a.targets, a.sizes, a.lr_min},
    {"x=y", 8, "t2r", true, false, {"a", "b", "c"}, {4}, -3e-5})
  t.eq(parse("--lr_min", "1").lr_min, 1)
  t.eq(parse("--fresh=yes").fresh, true)
  t.eq(parse("--fresh=no").fresh, false)
end)

t.test("what is refused", function()
  refused("unknown option --widnow; did you mean --window?", "--widnow", "3")
  refused("unknown option --qqq", "--qqq")
  refused("--window takes a number, not 'x'", "--window", "x")
  refused("--window takes a number, not 'nan'", "--window", "nan")
  refused("--window must be at least 1, not 0", "--window", "0")
  refused("--window needs a value", "--window")
  refused("--window needs a value; --fresh is an option (--window=--fresh if it is meant)", "--window", "--fresh")
  refused("--map takes one of hedgehog, t2r, not 'hedgehgo'; did you mean hedgehog?", "--map", "hedgehgo")
  refused("--sizes takes a number, not 'b'", "--sizes", "1,b")
  refused("--no-window: --window is not a switch", "--no-window")
  refused("--fresh takes yes or no, not 'perhaps'", "--fresh=perhaps")
  refused("unexpected argument 'model'; did you mean --model?", "model")
end)

t.test("required and positional", function()
  local p = {"x", {"dir", nil, "a folder", positional = true}, {"out", cli.required, "where"}, {"rest", {}, "more", positional = true}}
  local e = t.errors(function() cli.parse(p, {"a"}) end, "")
  t.eq(e.message, "--out is required: where")
  local a = cli.parse(p, {"a", "--out", "b", "c", "--", "--d"})
  t.eq({a.dir, a.out, a.rest}, {"a", "b", {"c", "--d"}})
  t.eq(cli.parse(p, {"--out", "b"}).dir, nil)
end)

t.test("named rows keep the order of the source", function()
  local source = 'lc.args {\n "s",\n zebra = {1, "z"},\n apple = {2, "a"},\n mango = {true, "m"},\n}'
  local _, _, options = cli.parse({"s", apple = {2, "a"}, mango = {true, "m"}, zebra = {1, "z"}}, {}, "x", source)
  t.eq({options[1].name, options[2].name, options[3].name}, {"zebra", "apple", "mango"})
end)

t.test("the result is strict", function()
  local a = parse()
  t.errors(function() return a.windwo end, "did you mean args.window")
  t.errors(function() a.nothing = 1 end, "not declared")
  a.window = 5
  t.eq(a.window, 5)
end)

t.test("a YAML file lies under the command line", function()
  local path = write("c.yaml", "window: 32\nmap: t2r\ntargets: [v, o]\nfresh: true\nlr-min: 1e-3\nmodel: ~\n")
  local a = parse("--config", path, "--window=16")
  t.eq({a.window, a.map, a.targets, a.fresh, a.lr_min, a.model}, {16, "t2r", {"v", "o"}, true, 1e-3, "smollm2"})
  refused(write("d.yaml", "widow: 3\n") .. ": unknown option 'widow'; did you mean window?", "--config", folder .. "/d.yaml")
  refused(write("e.yaml", "window: many\n") .. ": window takes a number, not 'many'", "--config=" .. folder .. "/e.yaml")
  refused(write("f.yaml", "- 1\n") .. ": expected a map of options", "--config", folder .. "/f.yaml")
  local e = t.errors(function() parse("--config", folder .. "/nothing.yaml") end, "")
  t.ok(e.message:find("nothing.yaml", 1, true))
end)

t.test("help", function()
  local values, text = parse("--help")
  t.eq(values, nil)
  for _, part in ipairs {"What it does.", "--window N", "(default 64)", "--[no-]chart", "hedgehog | t2r", "--lr-min N", "--config FILE"} do
    t.ok(text:find(part, 1, true), part .. " in\n" .. text)
  end
  t.ok(text:find("--model", 1, true) < text:find("--window", 1, true), "declared order")
end)

---- the program ----------------------------------------------------------------------------------------------------------

t.test("version, help, source", function()
  expect({"--version"}, 0, "lolcats " .. program.version)
  expect({"--help"}, 0, "Usage: lolcats", "doctor")
  expect({"--source", "doctor"}, 0, "lc.doctor()")
  expect({"--source", "doktor"}, 2, "did you mean 'doctor'?")
  expect({"help", "softmax"}, 0, "softmax(x, dim=-1)")
end)

t.test("usage errors end with 2", function()
  expect({"docter"}, 2, "there is no recipe 'docter'; did you mean 'doctor'?")
  expect({"doctor", "--verbse"}, 2, "lolcats doctor: unknown option --verbse", "Try: lolcats doctor --help")
  expect({"--sorce", "x"}, 2, "did you mean --source?")
  expect({"nothing.lua"}, 2, "nothing.lua: No such file or directory")
  expect({"-e"}, 2, "-e needs code")
  expect({folder .. "/"}, 2, folder)
end)

t.test("code on the command line", function()
  t.eq((run {"-e", "1 + 1"}), "2\n")
  t.eq((run {"-e", "x = 3", "-e", "x * 2"}), "6\n")
  t.eq((run {"-e", "print(...)"}), "\n")
  t.eq((run {"-e", "lc.zeros(2):numel()"}), "2\n")
  expect({"-e", "x @ x"}, 1, "hint: a matrix product is x:matmul(y)")
end)

t.test("a script on standard input", function()
  local out, status = run({"-", "a", "b"}, "print(arg[1], ...)\n")
  t.eq(out, "a\ta\tb\n")
  t.eq(status, 0)
  out, status = run({"-"}, "local x = 1\nerror('no')\n")
  t.eq(status, 1)
  t.ok(out:find("lolcats: stdin:2: no", 1, true), out)
end)

t.test("scripts: arguments, --help, exit status", function()
  local path = write("s.lua", [[
-- s.lua: a test
local lc = require "lolcats"
local args = lc.args {"A test.", n = {3, "a number"}, word = {"x", "a word"}}
print(args.n, args.word, lc.args_of().values.n, lc.args_of().file ~= nil)
]])
  t.eq((run {path}), "3\tx\t3\ttrue\n")
  t.eq((run {path, "--n=4", "--word", "y z"}), "4\ty z\t4\ttrue\n")
  expect({path, "--help"}, 0, "A test.", "--n N")
  expect({path, "--nn", "3"}, 2, "unknown option --nn; did you mean --n?")
end)

t.test("a script's own modules and the shebang line", function()
  write("helper_of_test.lua", "return {answer = 42}")
  t.eq((run {write("m.lua", "#!/usr/bin/env lolcats\nprint(require('helper_of_test').answer)\n")}), "42\n")
end)

t.test("undefined globals", function()
  expect({write("g.lua", "local x = 1\n\nprnt(x)\n")}, 1, "g.lua:3: undefined variable 'prnt'; did you mean 'print'?")
  expect({write("h.lua", "count = 1\n")}, 1, "h.lua:1: assignment to the undefined variable 'count'; write: local count")
  expect({write("i.lua", "local x = lc.zeros(2)\n")}, 1, "i.lua:1:", 'local lc = require "lolcats"')
end)

t.test("errors: the user's frames, or all of them", function()
  local path = write("e.lua", [[
local lc = require "lolcats"
local function inner() local y = lc.zeros(2, 3):matmul(lc.zeros(4, 5)) return y end
local function outer() local y = inner() return y end
outer()
]])
  local out = expect({path}, 1, "e.lua:2:", "matmul", "called from:", "e.lua:2:", "e.lua:3: in ", "e.lua:4: in main chunk")
  t.ok(not out:find("lua/lolcats/", 1, true) and not out:find("lolcats op", 1, true), out)
  local pipe = io.popen("LOLCATS_TRACE=full " .. quote(program.path) .. " " .. quote(path) .. " 2>&1")
  out = pipe:read("*a")
  pipe:close()
  t.ok(out:find("lua/lolcats/", 1, true), out)
  expect({write("t.lua", "error({1})\n")}, 1, "lolcats: table")
  expect({write("n.lua", "error()\n")}, 1, "error without a message")
  expect({write("y.lua", "local = 3\n")}, 1, "y.lua:1:")
end)

t.test("a missing device ends with 3", function()
  expect({"-e", "lc.zeros(2, {device = 'cuda:7'})"}, 3, "cuda:7")
end)

t.test("a full disk is an error", function()
  local pipe = io.popen(quote(program.path) .. " -e '(\"x\"):rep(10)' >/dev/full 2>" .. quote(folder .. "/err") .. "; echo $?")
  t.eq(pipe:read("*l"), "3")
  pipe:close()
end)

t.test("a reader that goes away is no error", function()
  local pipe = io.popen(quote(program.path) .. " -e 'for i = 1, 1e5 do print(i) end' 2>&1 | head -n 1")
  t.eq(pipe:read("*a"), "1\n")
  pipe:close()
end)

t.test("a mapped file that is cut off while it is read", function()
  local path = write("cut.lua", ([[
    local lc = require "lolcats"
    local path = %q
    lc.files.save_tensors(path, {x = lc.ones(100, 1000)})
    local x = lc.files.open_tensors(path):tensor("x")
    os.execute("truncate -s 200 " .. path)
    print(x:sum():item())
  ]]):format(folder .. "/cut.safetensors"))
  expect({path}, 3, "was cut off or replaced in place")
end)

-- Starts a script in the background, interrupts it once it has printed, again and again if `insist`, and returns its output and status.
local function interrupt(code, insist)
  local path, log = write("loop.lua", code), folder .. "/log"
  local script = write("loop.sh", ([[
env --default-signal=INT %s %s >%s 2>&1 &
pid=$!
while kill -0 $pid && ! grep -q go %s; do sleep 0.05; done
%s
wait $pid
echo "=$?" >>%s
]]):format(quote(program.path), quote(path), quote(log), quote(log),
    insist and "while kill -INT $pid; do sleep 0.3; done" or "kill -INT $pid", quote(log)))
  os.execute("sh " .. quote(script) .. " 2>/dev/null") -- a shell's background jobs ignore SIGINT: hence env
  local file = io.open(log)
  local text = file:read("*a")
  file:close()
  return text
end

t.test("Ctrl-C stops a loop of ops, and a loop of Lua", function()
  local go = 'io.stdout:write("go\\n") io.stdout:flush() '
  local text = interrupt(go .. 'local lc = require "lolcats" while true do lc.zeros(100) end')
  t.ok(text:find("interrupted", 1, true) and text:find("=130", 1, true), text)
  text = interrupt(go .. "local list, i = {}, 0 while true do i = i + 1 list[i % 9] = tostring(i) end")
  t.ok(text:find("=130", 1, true), text)
end)

t.test("a second Ctrl-C ends what the first cannot", function()
  local text = interrupt('io.stdout:write("go\\n") io.stdout:flush() while true do end', true)
  t.ok(text:find("=130", 1, true), text)
end)

os.execute("rm -rf " .. quote(folder))
t.finish()
