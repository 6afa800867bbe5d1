-- resume.lua: kill -9 at random moments, run again, until a training run ends: its weights are those of an undisturbed run, bit for
-- bit, and so are its metrics. Run by the program: lolcats tests/resume.lua [--times 10] [--seed N]. With --child it is the training.
local lc = require "lolcats"
local files = lc.files
local args = lc.args {
    "Kill a training run at random moments and compare with an undisturbed one.",
    { "times", 10, "killed runs" },
    { "seed", 1, "of the moments" },
    { "steps", 60, "updates of a run" },
    { "child", false, "be the training run" },
    { "out", "", "its folder" },
    { "pause", 0, "milliseconds of idling a micro-step" },
    { "fresh", false, "start over" },
    { "stop", 0, "update at which the run sends itself a signal" },
    { "signal", "KILL", "which" },
}

-- A run that uses all that a resume must bring back: random numbers, momentum, a plateau, accumulation over an epoch's end,
-- evaluation, best parameters.
local function child()
    local data = require "lolcats.data"
    local ids, x = {}, 1
    for i = 1, 1500 do
        x = (x * 75 + 74) % 65537
        ids[i] = (x % 7 + (ids[i - 1] or 0) * 3) % 23
    end
    local rows = data.from_ids(ids, { seq = 24, hold_out = 0.15, vocabulary = 23 })
    lc.manual_seed(5)
    local D = 16
    local params = {}
    local function param(name, t)
        params[#params + 1] = { name = name, tensor = lc.param(t) }
        return t
    end
    local embed, mix = param("embed", lc.randn(23, D)), param("mix", lc.randn(2 * D, D) * 0.3)
    local back = param("back", lc.randn(D, 2 * D) * 0.2)
    local function loss(batch, p)
        local h = lc.embedding(embed, batch.ids):slice(2, 1, -2):reshape(-1, D)
        if p then h = (lc.dropout(h, p)) end
        h = h + lc.linear(lc.linear(h, mix):tanh(), back)
        return (lc.cross_entropy(lc.linear(h, embed), batch.ids:slice(2, 2, -1):reshape(-1)))
    end
    local run = lc.run {
        name = "a", out = args.out, data = rows, batch = 2, accumulate = 3, params = params, optim = lc.adamw { lr = 0.02 }, clip = 1,
        schedule = lc.plateau { factor = 0.5, patience = 1 }, max_steps = args.steps, eval_every = 7, save_every = 2, quiet = true,
        seed = 3, neutral = { "pause", "times", "stop", "signal" },
        eval = function()
            local total, held = 0, rows.held:list()
            for _, row in ipairs(held) do total = total + loss(row):item() / #held end
            return { loss = total, ppl = math.exp(total) }
        end,
    }
    for batch in run:steps() do
        if batch.step == args.stop and batch.micro == 2 then io.popen("kill -" .. args.signal .. " $PPID"):close() end
        run:backward(loss(batch, 0.2))
        if args.pause > 0 then
            local stop = lc.now() + args.pause / 1e3
            while lc.now() < stop do end
        end
    end
    for _, p in ipairs(params) do print(p.name, files.sha256(p.tensor:detach():contiguous())) end
    -- the metrics but for the clock
    print("metrics", files.sha256((files.read(args.out .. "/a/metrics.jsonl"):gsub('"seconds":[%d.]+', ""))))
end

if args.child then
    child()
    return
end

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end
local me = os.getenv "LOLCATS_PROGRAM" or require("lolcats.program").path
local script = arg[0]
local root = os.tmpname()
os.remove(root)
files.make_dirs(root)

-- Runs the child; returns what it printed and its status.
local function run(out, prefix, pause)
    local log = root .. "/log"
    local status = os.execute(("%s %s %s --child --out %s --steps %d --pause %g > %s 2> %s.err"):format(prefix or "", quote(me), quote(script),
        quote(out), args.steps, pause or 0, quote(log), quote(log)))
    return files.read(log), status, files.read(log .. ".err")
end

local want, status, err = run(root .. "/undisturbed")
local begin = lc.now()
run(root .. "/timed", nil, 2)
local duration = lc.now() - begin
if status ~= 0 then
    io.stderr:write("the undisturbed run failed:\n", err)
    os.exit(1)
end

math.randomseed(args.seed)
local same, kills, runs = 0, 0, 0
for i = 1, args.times do
    local out = ("%s/killed%d"):format(root, i)
    local got
    for attempt = 1, 40 do
        runs = runs + 1
        local seconds = 0.02 + math.random() * duration -- on a busy machine a run takes longer
        local last = attempt > 6 -- then it may end
        -- foreground: else timeout ends before the killed process has, which still holds the lock
        got, status, err = run(out, not last and ("timeout --foreground -s KILL %.3f"):format(seconds) or nil, 2)
        if status == 0 then break end
        if last then
            io.stderr:write(("run %d did not go on after a kill:\n%s"):format(i, err))
            os.exit(1)
        end
        kills = kills + 1
    end
    if got == want then
        same = same + 1
    else
        print(("run %d differs from the undisturbed one:\n%swanted\n%s"):format(i, got, want))
    end
end
os.execute("rm -rf " .. quote(root))
print(("%d of %d killed runs ended with the weights and metrics of an undisturbed one (%d kills)"):format(same, args.times, kills))
os.exit(same == args.times and 0 or 1)
