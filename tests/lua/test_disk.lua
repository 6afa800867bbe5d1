-- test_disk.lua: a disk that is really full. In a name space of its own (unshare, as an ordinary user too) it mounts a small tmpfs and
-- runs itself again inside: what is saved there fails with the file's name and the system's reason, and what was there before stays.
-- The same for a disk that may only be read.
local t = dofile(((arg and arg[0] or ""):match("^(.*/)") or "") .. "harness.lua")
local lc = require "lolcats"
local program = require "lolcats.program"
local files, optim = lc.files, require "lolcats.optim"

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

local disk, repo = arg[1], (arg[0]:match("^(.*/)lua/") or "tests/")
if not disk then
  local folder = os.tmpname()
  os.remove(folder)
  files.make_dirs(folder)
  local mount = "mount -t tmpfs -o size=%s lolcats " .. quote(folder)
  local own = "unshare --user --map-root-user --mount sh -c "
  local possible = os.execute(own .. quote(mount:format("64k")) .. " > /dev/null 2>&1") == 0
  local status = 77
  if possible then
    status = os.execute(own .. quote(mount:format("1m") .. (" && exec %s %s %s"):format(quote(program.path), quote(arg[0]), quote(folder))))
    if status > 255 then status = math.floor(status / 256) end
  else
    t.skip("a full disk", "a small disk cannot be mounted here (unshare and mount, without privileges)")
  end
  os.remove(folder)
  os.exit(status)
end

local NO_SPACE = "No space left on device"
local function path(name) return disk .. "/" .. name end

-- Fills the disk but for `left` KB; room() makes space again.
local function fill(left)
  local spare = io.open(path("spare"), "wb")
  spare:write(("s"):rep(left * 1024))
  spare:close()
  os.execute(("cat /dev/zero > %s 2> /dev/null"):format(quote(path("filler"))))
  os.remove(path("spare"))
end
local function room() os.remove(path("filler")) end

local function shell(command)
  local pipe = io.popen(command .. " 2>&1; echo \"=$?\"")
  local out, status = pipe:read("*a"):match("^(.*)=(%d+)\n$")
  pipe:close()
  return tonumber(status), out
end

local function refused(name, f)
  local e = t.errors(f, NO_SPACE)
  t.eq(e.code, "EIO")
  t.ok(e.message:find(path(name), 1, true), e.message)
  t.eq(files.exists(path(name) .. ".tmp"), false, "remains")
end

-- first: a run of this process keeps its lock open for writing, and the disk busy with it
t.test("a folder that may only be read", function()
  files.make_dirs(path("given"))
  files.save_tensors(path("given/x.safetensors"), {x = lc.ones(3)})
  t.eq(os.execute(("mount -o remount,ro %s"):format(quote(disk))), 0)
  for _, name in ipairs {"given", "new"} do
    local status, text = shell(("%s %sresume.lua --child --out %s"):format(quote(program.path), repo, quote(path(name))))
    t.eq(status, 3, text)
    t.ok(text:find("the run folder " .. path(name), 1, true) and text:find("Read-only file system", 1, true), text)
  end
  local e = t.errors(function() files.save_tensors(path("given/x.safetensors"), {x = lc.ones(4)}) end, "Read%-only file system")
  t.ok(e.message:find(path("given/x.safetensors"), 1, true), e.message)
  local f = files.open_tensors(path("given/x.safetensors"))
  t.eq(f:tensor("x"):sum():item(), 3)
  f:close()
  t.eq(os.execute(("mount -o remount,rw %s"):format(quote(disk))), 0)
end)

t.test("files and tensors: the old one stays", function()
  local x = lc.randn(1000)
  files.save_tensors(path("x.safetensors"), {x = x})
  files.write(path("x.txt"), "old")
  fill(8)
  refused("x.safetensors", function() files.save_tensors(path("x.safetensors"), {x = lc.zeros(100, 1000)}) end)
  refused("x.txt", function() files.write(path("x.txt"), ("n"):rep(20000)) end)
  refused("new.safetensors", function() files.save_tensors(path("new.safetensors"), {x = lc.zeros(100, 1000)}) end)
  room()
  t.eq(files.read(path("x.txt")), "old")
  local f = files.open_tensors(path("x.safetensors"))
  t.close(f:tensor("x"), x, 0)
  f:close()
  t.eq(files.exists(path("new.safetensors")), false)
end)

-- A run that fills the disk at update `at`.
local function train(out, at, save_every)
  local w = lc.param(lc.ones(2000))
  local run = lc.run {name = "a", out = path(out), params = {{name = "w", tensor = w}}, optim = optim.sgd {lr = 0.01}, max_steps = 300,
                      save_every = save_every, quiet = true}
  for batch in run:steps() do
    if batch.step == at then fill(0) end
    run:backward((w * w):sum())
  end
  return run, w
end

t.test("a checkpoint does not fit: the one before stands and is gone on from", function()
  local _, want = train("free", 0, 10)
  local e = t.errors(function() train("full", 15, 10) end, NO_SPACE)
  t.eq(e.code, "EIO")
  t.ok(e.message:find("cannot save " .. path("full/a"), 1, true), e.message)
  t.ok(e.message:find("last.safetensors", 1, true) and e.message:find("the checkpoint of update 10 stands as it was", 1, true), e.message)
  require("lolcats.core.scope").recover(0)
  room()
  local run, got = train("full", 0, 10)
  t.eq(run.resumed, 10)
  t.close(got:detach(), want:detach(), 0)
end)

t.test("metrics do not fit: the checkpoint stands", function()
  local e = t.errors(function() train("lines", 60, 50) end, NO_SPACE)
  t.ok(e.message:find(path("lines/a/metrics.jsonl"), 1, true), e.message)
  require("lolcats.core.scope").recover(0)
  room()
  local run = train("lines", 0, 50)
  t.eq(run.resumed, 50)
  local lines = 0
  for line in io.lines(path("lines/a/metrics.jsonl")) do
    lines = lines + 1
    t.eq(files.parse_json(line, "metrics").step, lines)
  end
  t.eq(lines, 300)
end)

t.test("a run of its own ends with status 3 and says what it could not write", function()
  local function child(more)
    return shell(("%s %sresume.lua --child --out %s --steps 20 %s"):format(quote(program.path), repo, quote(path("own")), more or ""))
  end
  local _, out = shell(("%s %sresume.lua --child --out %s --steps 20"):format(quote(program.path), repo, quote(path("other"))))
  t.ok(child("--stop 9") ~= 0, "it was to be killed")
  fill(0)
  local status, text = child()
  t.eq(status, 3, text)
  t.ok(text:find(NO_SPACE, 1, true) and text:find(path("own/a/"), 1, true), text)
  room()
  status, text = child()
  t.eq(status, 0, text)
  t.ok(text:find("going on after update", 1, true), text)
  t.eq(text:match("metrics.*"), out:match("metrics.*"))
end)

local tool = (os.getenv "LOLCATS_TEST_BUILD" or "build") .. "/tests/c_terminal"
t.test("a session goes on, says once that its history is not saved, and keeps the one there is", function()
  local function session(...)
    local steps = {"expect > "}
    for _, s in ipairs {...} do steps[#steps + 1] = s end
    steps[#steps + 1] = "type :quit\\r"
    local script = os.tmpname()
    files.write(script, table.concat(steps, "\n") .. "\n")
    local status, text = shell(("XDG_STATE_HOME=%s TERM=xterm %s %s %s"):format(quote(disk), quote(tool), script, quote(program.path)))
    os.remove(script)
    return status, text
  end
  local status, text = session("type first = 1\\r", "expect > ")
  if status == 77 or status == 127 then return t.skip("history on a full disk", "no pseudo-terminal") end
  t.eq(status, 0, text)
  fill(0)
  status, text = session("type 20 + 1\\r", "expect \\n21\\r\\n", "expect > ", "type 20 + 2\\r", "expect \\n22\\r\\n", "expect > ")
  room()
  t.eq(status, 0, text)
  t.eq(select(2, text:gsub("the history is not saved: cannot write [^\n]*: " .. NO_SPACE, "")), 1, text)
  t.ok(files.read(path("lolcats/history")):find("first", 1, true), "the history is gone")
end)

t.finish()
