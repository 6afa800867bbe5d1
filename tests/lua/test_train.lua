-- Training: optimizers and schedules, lc.run's arithmetic, evaluation, checkpoints, resume, and everything that must end with a
-- clear message and an intact checkpoint.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files, data, optim = lc.files, require "lolcats.data", require "lolcats.optim"

local here = (arg[0]:match("^(.*/)lua/") or "tests/")
local me = os.getenv "LOLCATS_PROGRAM" or require("lolcats.program").path
local root = os.tmpname()
os.remove(root)
files.make_dirs(root)
local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

local count = 0
local function place()
    count = count + 1
    return ("%s/run%d"):format(root, count)
end

-- Runs a command; returns status, stdout, stderr.
local function shell(command)
    local out = root .. "/shell"
    local status = os.execute(("( %s ) > %s.out 2> %s.err < /dev/null"):format(command, out, out))
    if status > 255 then status = math.floor(status / 256) end
    return status, files.read(out .. ".out"), files.read(out .. ".err")
end
local function have(tool) return os.execute("command -v " .. tool .. " > /dev/null 2>&1") == 0 end

-- ---- optimizers and schedules -------------------------------------------------------------------------------------
local function params(...)
    local list = {}
    for i, v in ipairs { ... } do list[i] = { name = "p" .. i, tensor = lc.param(lc.tensor(v, { dtype = "f64" })) } end
    return list
end

t.test("SGD and AdamW step as the formulas say", function()
    local p = params({ 1, 2 }, { 3 })
    local o = lc.sgd(p, { lr = 0.1, momentum = 0.9 })
    for step = 1, 2 do
        o:zero_grad()
        local loss = p[1].tensor:square():sum() + p[2].tensor:sum()
        loss:backward()
        t.close(p[2].tensor.grad, { 1 }, 1e-15)
        o:step()
    end
    t.close(p[1].tensor, { 1 - 0.2 - 0.1 * (0.9 * 2 + 1.6), 2 - 0.4 - 0.1 * (0.9 * 4 + 3.2) }, 1e-12)
    t.close(p[2].tensor, { 3 - 0.1 - 0.19 }, 1e-12)
    local q = params { 1 }
    local a = lc.adamw(q, { lr = 0.1, weight_decay = 0.5 })
    q[1].tensor:sum():backward()
    a:step()
    t.close(q[1].tensor, { 1 * (1 - 0.05) - 0.1 / (1 + 1e-8) }, 1e-12)
end)

t.test("clipping gives the norm and scales all gradients", function()
    local p = params({ 3 }, { 4 })
    local o = lc.sgd(p, { lr = 1 })
    local loss = (p[1].tensor:square():sum() + p[2].tensor:square():sum()) * 0.5
    loss:backward()
    t.close(o:clip(1), 5, 1e-12)
    t.close(p[1].tensor.grad, { 3 / (5 + 1e-6) }, 1e-12)
    t.close(o:clip(100), 5 / (5 + 1e-6), 1e-12)
    t.close(p[2].tensor.grad, { 4 / (5 + 1e-6) }, 1e-12)
end)

t.test("parameters become views of one buffer and keep their values", function()
    local p = params({ 1, 2, 3 }, { { 4, 5 }, { 6, 7 } })
    local o = lc.adamw(p, {})
    t.eq(p[1].tensor:storage_id(), p[2].tensor:storage_id())
    t.eq(p[2].tensor:totable(), { { 4, 5 }, { 6, 7 } })
    t.eq(o.flat.n, 7)
end)

t.test("schedules", function()
    local s = lc.cosine { warmup = 2, total = 10 }:start(1)
    t.close({ s:rate(0), s:rate(1), s:rate(2), s:rate(6), s:rate(10) }, { 0, 0.5, 1, 0.5, 0 }, 1e-12)
    s = lc.linear_decay { warmup = 2 }:start(2, 6)
    t.close({ s:rate(1), s:rate(2), s:rate(4), s:rate(6), s:rate(7) }, { 1, 2, 1, 0, 0 }, 1e-12)
    s = lc.plateau { patience = 1, factor = 0.5, min_lr = 0.2 }:start(1)
    local seen = {}
    for i, v in ipairs { 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5 } do
        s:observe(v)
        seen[i] = s:rate()
    end
    t.eq(seen, { 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2 })
end)

t.test("typos and nonsense in optimizers and schedules", function()
    t.errors(function() lc.adamw { learning_rate = 1 } end, "no option 'learning_rate'")
    t.errors(function() lc.adamw { lr = -1 } end, "lr must be a number of at least 0")
    t.errors(function() lc.adamw { betas = { 0.9 } } end, "betas are two numbers")
    t.errors(function() lc.cosine { warm = 1 } end, "no option 'warm'")
    t.errors(function() lc.adamw({ lc.zeros(2) }, {}) end, "does not require a gradient")
    t.errors(function() lc.adamw({}, {}) end, "nothing to train")
    t.errors(function() lc.adamw { lr = 1 }:step() end, "no parameters yet")
    t.errors(function() optim.schedule "exponential" end, "no schedule 'exponential'")
end)

-- ---- a small problem ----------------------------------------------------------------------------------------------
local function rows(n)
    local ids, x = {}, 3
    for i = 1, n or 400 do
        x = (x * 75 + 74) % 65537
        ids[i] = x % 5 + (i % 2) * 4
    end
    return data.from_ids(ids, { seq = 12, hold_out = 0.2, vocabulary = 9 })
end

local function problem(seed)
    lc.manual_seed(seed or 1)
    local a, b = lc.param(lc.randn(9, 6)), lc.param(lc.randn(9, 6) * 0.5)
    local p = { params = { { name = "in.weight", tensor = a }, { name = "out.weight", tensor = b } } }
    function p.loss(batch)
        local x = lc.embedding(a, batch.ids):slice(2, 1, -2):reshape(-1, 6)
        return (lc.cross_entropy(lc.linear(x, b), batch.ids:slice(2, 2, -1):reshape(-1)))
    end
    function p.sums() return { files.sha256(a:detach():contiguous()), files.sha256(b:detach():contiguous()) } end
    return p
end

local function options(p, d, more)
    local o = { name = "a", out = place(), data = d, params = p.params, optim = lc.adamw { lr = 0.05 }, max_steps = 12, quiet = true,
                fresh = false }
    for k, v in pairs(more or {}) do o[k] = v end
    return o
end

local function train(p, d, more, stop_after)
    local o = options(p, d, more)
    local run = lc.run(o)
    for batch in run:steps() do
        run:backward(p.loss(batch))
        if stop_after and batch.step > stop_after then break end
    end
    return run, o
end

t.test("accumulated rows are one large batch", function()
    local d = rows()
    local order = {}
    for i = 1, 24 do order[i] = i end
    local p, q = problem(), problem()
    local run = train(p, d, { accumulate = 4, order = order, max_steps = 6 })
    train(q, d, { batch = 4, order = order, max_steps = 6 })
    t.close(p.params[1].tensor, q.params[1].tensor, 1e-5)
    t.eq(run.step, 6)
    t.eq(lc.scope_depth(), 0)
end)

t.test("epochs, partial accumulation and tokens are counted", function()
    local d = rows()
    local run = train(problem(), d, { max_steps = false or nil, epochs = 2, accumulate = 5 })
    local p = problem()
    local o = options(p, d, { accumulate = 5 })
    o.max_steps, o.epochs = nil, 2
    run = lc.run(o)
    local seen, epoch_of = 0, {}
    for batch in run:steps() do
        seen = seen + 1
        epoch_of[seen] = run.epoch
        run:backward(p.loss(batch))
    end
    t.eq(run.updates, math.floor(2 * d.rows / 5))
    t.eq(seen, run.updates * 5)
    t.eq({ epoch_of[d.rows], epoch_of[d.rows + 1] }, { 1, 2 })
    t.eq(run.tokens, seen * 12)
end)

t.test("drop_leftover forgets what an epoch's end leaves over", function()
    local p, q, d = problem(), problem(), rows()
    local n = d.rows
    local accumulate = n - 1 -- the second update begins with the last row of the first epoch
    local function go(r, drop)
        local run = lc.run(options(r, d, { out = place(), accumulate = accumulate, epochs = 2, optim = lc.sgd { lr = 0.05 }, max_steps = 2,
                                           drop_leftover = drop }))
        local k = 0
        for batch in run:steps() do
            k = k + 1
            if not (drop == nil and k == n) then run:backward(r.loss(batch)) end -- without the option: the row is left out by hand
        end
    end
    go(p, true)
    go(q)
    t.eq(p.sums(), q.sums())
end)

t.test("clip limits what the optimizer sees; the log has the norm before", function()
    local p = problem()
    local run, o = train(p, rows(), { clip = 1e-3, optim = lc.sgd { lr = 1 }, max_steps = 1 })
    local before = problem()
    local moved = 0
    for i, x in ipairs(p.params) do
        moved = moved + (x.tensor:detach() - before.params[i].tensor:detach()):square():sum():item()
    end
    t.close(math.sqrt(moved), 1e-3, 1e-5)
    local line = files.parse_json(files.read(o.out .. "/a/metrics.jsonl"):match "[^\n]+", "line")
    t.ok(line.grad_norm > 0.01 and line.loss and line.lr == 1 and line.step == 1)
    t.eq(run.shown.loss, line.loss)
end)

t.test("evaluation names the best, keeps it and brings it back", function()
    local p, calls = problem(), 0
    local scores, at = { 3, 1, 2, 5 }, {}
    local run, o = train(p, rows(), { eval_every = 3, eval = function()
        calls = calls + 1
        at[calls] = p.sums()
        return { loss = scores[calls], other = 7 }
    end })
    t.eq(calls, 4)
    t.eq(run.best, { value = 1, step = 6 })
    t.eq(p.sums(), at[2], "the best parameters")
    local f = files.open_tensors(o.out .. "/a/last.safetensors")
    t.eq(files.sha256(f:tensor("in.weight"):contiguous():clone()), at[4][1], "last.safetensors holds the last ones")
    f:close()
    local text = files.read(o.out .. "/a/metrics.jsonl")
    t.ok(text:find('"eval":{"loss":1,"other":7},"step":6', 1, true), text)
    local s = files.read_json(o.out .. "/a/summary.json")
    t.eq({ s.updates, s.best.step, s.held_out.loss, s.parameters }, { 12, 6, 5, 108 })
    t.ok(files.read(o.out .. "/a/losses.svg"):find "^<svg.*held%-out loss.*</svg>")
    t.ok(files.exists(o.out .. "/a/args.json") and files.exists(o.out .. "/a/recipe.lua"))
end)

t.test("a plateau schedule follows the evaluations", function()
    local p = problem()
    local run, o = train(p, rows(), { schedule = lc.plateau { patience = 0, factor = 0.1 }, eval_every = 2, eval = function() return 1 end,
                                      max_steps = 6 })
    local lrs = {}
    for line in files.read(o.out .. "/a/metrics.jsonl"):gmatch "[^\n]+" do lrs[#lrs + 1] = tonumber(line:match '"lr":([%d.e-]+)') end
    t.close(lrs, { 0.05, 0.05, 0.05, 0.05, 0.005, 0.005 }, 1e-12)
    t.eq(run.step, 6)
end)

t.test("break leaves no scope open once the run is finished", function()
    local run = train(problem(), rows(), {}, 4)
    run:finish()
    t.eq(lc.scope_depth(), 0)
    t.eq(run.finished, false)
end)

t.test("eval may be a number of any sense: mode = max", function()
    local n = 0
    local run = train(problem(), rows(), { metric = "acc", mode = "max", eval_every = 4, eval = function()
        n = n + 1
        return { acc = ({ 0.1, 0.9, 0.5 })[n] }
    end })
    t.eq(run.best, { value = 0.9, step = 8 })
end)

-- ---- resume -------------------------------------------------------------------------------------------------------
t.test("stopped and resumed is never stopped, bit for bit", function()
    local function evaluate(p, d) return function() return p.loss(d.held:row(1)):item() end end
    local d = rows()
    local p = problem()
    local more = { accumulate = 2, schedule = "cosine", clip = 1, eval_every = 5 }
    more.eval = evaluate(p, d)
    local _, whole = train(p, d, more)
    for _, stop in ipairs { 1, 5, 10 } do
        local q = problem()
        more.eval, more.out, more.optim = evaluate(q, d), place(), lc.adamw { lr = 0.05 }
        train(q, d, more, stop):finish()
        local r = problem(99) -- what it starts from does not matter
        more.eval, more.optim = evaluate(r, d), lc.adamw { lr = 0.05 }
        local run = train(r, d, more)
        t.eq(run.resumed, stop)
        t.eq(r.sums(), p.sums(), "after a stop at " .. stop)
        local function metrics(out) return (files.read(out .. "/a/metrics.jsonl"):gsub('"seconds":[%d.]+', "")) end
        t.eq(metrics(more.out), metrics(whole.out), "metrics after a stop at " .. stop)
    end
end)

t.test("a finished run gives its weights back and trains no more", function()
    local p, q = problem(), problem(5)
    local d = rows()
    local _, o = train(p, d)
    local steps = 0
    local run = lc.run(options(q, d, { out = o.out }))
    for _ in run:steps() do steps = steps + 1 end
    t.eq(steps, 0)
    t.eq(q.sums(), p.sums())
end)

t.test("fresh starts over", function()
    local d, p = rows(), problem()
    local _, o = train(p, d)
    local q = problem()
    local run = train(q, d, { out = o.out, fresh = true })
    t.eq(run.resumed, nil)
    t.eq(q.sums(), p.sums())
end)

t.test("a folder of another run is refused with the difference", function()
    local d = rows()
    local _, o = train(problem(), d)
    local function again(more)
        more.out = o.out
        return function() lc.run(options(problem(), d, more)) end
    end
    t.errors(again { accumulate = 3 }, "holds another run.*accumulate: 1 there, 3 here.*%-%-fresh")
    t.errors(again { optim = lc.adamw { lr = 0.1 } }, "optim.lr: 0.05 there, 0.1 here")
    t.errors(again { clip = 2 }, "clip: nothing there, 2 here")
    t.errors(function() lc.run(options(problem(), rows(300), { out = o.out })) end, "data.rows: %d+ there, %d+ here")
end)

t.test("metrics written after the last checkpoint are cut off", function()
    local d, p = rows(), problem()
    local run, o = train(p, d, {}, 6)
    run:finish()
    local path = o.out .. "/a/metrics.jsonl"
    local kept = files.read(path)
    files.append(path, '{"step":7,"loss":1}\n{"step":8,"lo')
    lc.run(options(problem(), d, { out = o.out }))
    t.eq(files.read(path), kept)
end)

-- ---- what goes wrong ----------------------------------------------------------------------------------------------
t.test("options of lc.run are checked", function()
    local d = rows()
    t.errors(function() lc.run(options(problem(), d, { epoch = 1 })) end, "no option 'epoch'.*did you mean 'epochs'")
    t.errors(function() lc.run(options(problem(), d, { accumulate = 0 })) end, "accumulate must be a whole number")
    t.errors(function() lc.run(options(problem(), d, { clip = "1" })) end, "clip must be a number, got a string")
    t.errors(function() lc.run(options({ params = {} }, d)) end, "nothing to train")
    t.errors(function() lc.run(options(problem(), d, { batch = 1000 })) end, "a batch of 1000 rows")
    t.errors(function() lc.run(options(problem(), d, { eval_every = 5 })) end, "eval_every needs eval")
    t.errors(function() train(problem(), d, { eval = function() return { ppl = 1 } end }) end, "no 'loss'.*ppl")
end)

local function after_nan(break_it, pattern)
    return function()
        local d, p = rows(), problem()
        local o = options(p, d, { save_every = 1, model = nil })
        local run = lc.run(o)
        local problem_text
        local ok, e = pcall(function()
            for batch in run:steps() do
                if batch.step == 5 then break_it(p) end
                run:backward(p.loss(batch))
            end
        end)
        t.ok(not ok, "nothing was raised")
        problem_text = tostring(e)
        t.eq(e.code, "ENONFINITE")
        t.ok(problem_text:find(pattern), problem_text)
        t.ok(problem_text:find "at update 5", problem_text)
        t.ok(problem_text:find "checkpoint of update 4 .* is intact", problem_text)
        require("lolcats.core.scope").recover(0)
        local q = problem()
        local again = lc.run(options(q, d, { out = o.out, save_every = 1 }))
        t.eq(again.step, 4)
        t.ok(not again.optim.flat.data:detach():sum():item() ~= again.optim.flat.data:detach():sum():item())
        t.eq(lc.count_nonfinite(q.params[1].tensor:detach()):item(), 0)
    end
end
t.test("a NaN in a parameter names it and the step; the checkpoint is intact", after_nan(function(p)
    p.params[2].tensor:detach():narrow(1, 3, 1):fill_(0 / 0)
end, "out%.weight holds values that are not finite"))
t.test("a gradient that is not finite names its parameter", function()
    local d, p = rows(), problem()
    local run = lc.run(options(p, d, { save_every = 1 }))
    local blow = lc.custom { forward = function(_, x) return x:clone() end, backward = function(_, g) return g * (0 / 0) end }
    local ok, e = pcall(function()
        for batch in run:steps() do
            run:backward(p.loss(batch) + (batch.step == 3 and blow(p.params[2].tensor):sum() * 1e-3 or 0))
        end
    end)
    t.ok(not ok)
    t.ok(tostring(e):find "the gradient of out%.weight is not finite", tostring(e))
    require("lolcats.core.scope").recover(0)
end)

t.test("a run folder that cannot be made or written says so", function()
    files.write(root .. "/file", "x")
    t.errors(function() lc.run(options(problem(), rows(), { out = root .. "/file/run" })) end, "cannot be made")
    t.errors(function() lc.run(options(problem(), rows(), { out = "/proc/nothing" })) end, "/proc/nothing")
end)

t.test("two runs in one folder: the second is told", function()
    if not have "flock" then return t.skip("two runs in one folder", "flock is not here") end
    local out = place()
    files.make_dirs(out)
    local other = io.popen(("exec flock %s/.lock sh -c 'echo $$; exec sleep 600'"):format(quote(out)))
    local pid = other:read "*l" -- it holds the lock now
    local ok, e = pcall(lc.run, options(problem(), rows(), { out = out }))
    os.execute("kill " .. pid)
    other:close()
    t.ok(not ok and tostring(e):find "in use by another process", tostring(e))
    t.eq(e.code, "EIO")
end)

local function child(out, more, prefix)
    return ("%s %s %sresume.lua --child --out %s %s"):format(prefix or "", quote(me), here, quote(out), more or "")
end

t.test("a full disk ends the run with a message and leaves the last checkpoint", function()
    local out = place()
    local status, said = shell(child(out, "--steps 20"))
    t.eq(status, 0)
    local other = place()
    t.ok(shell(child(other, "--steps 20 --stop 9 --signal KILL")) ~= 0, "it was to be killed")
    t.ok(files.exists(other .. "/a/last.safetensors"))
    -- files may not grow past 4 blocks of 512 bytes: the next checkpoint does not fit
    local code, _, err = shell("trap '' XFSZ; ulimit -f 4; " .. child(other, "--steps 20"))
    t.eq(code, 3, "status")
    t.ok(err:find "cannot save" or err:find "write", err)
    local now, text = shell(child(other, "--steps 20"))
    t.eq(now, 0)
    t.eq(text, said, "resumed after the disk was full")
end)

t.test("Ctrl-C saves, says how to go on, exits with 130; going on ends as if undisturbed", function()
    local _, want = shell(child(place(), "--steps 30"))
    local out = place()
    local status, _, err = shell(child(out, "--steps 30 --stop 13 --signal INT", "env --default-signal=INT"))
    t.eq(status, 130, "status; " .. err)
    t.ok(err:find "interrupted; .*the same command goes on", err)
    local code, got = shell(child(out, "--steps 30"))
    t.eq(code, 0)
    t.eq(got, want)
end)

t.test("another recipe, or other arguments, in a recipe's folder", function()
    local out = place()
    t.eq((shell(child(out, "--steps 6"))), 0)
    local status, _, err = shell(child(out, "--steps 9"))
    t.eq(status, 1)
    t.ok(err:find "steps: 6 there, 9 here", err)
    local script = root .. "/other.lua"
    files.write(script, files.read(here .. "resume.lua"))
    status, _, err = shell(("%s %s --child --out %s --steps 6"):format(quote(me), quote(script), quote(out)))
    t.eq(status, 1)
    t.ok(err:find "recipe: 'resume' there, 'other' here", err)
    t.eq((shell(child(out, "--steps 9 --fresh"))), 0)
end)

-- ---- examples and recipes run -------------------------------------------------------------------------------------
t.test("examples/own_training_loop.lua", function()
    local status, said, err = shell(quote(me) .. " own_training_loop --steps 300")
    t.eq(status, 0, err)
    local first, last = tonumber(said:match "step 100  loss ([%d.]+)"), tonumber(said:match "step 300  loss ([%d.]+)")
    t.ok(last < first, said)
end)

t.test("examples/tiny_lm.lua", function()
    local status, said, err = shell(("%s tiny_lm --steps 30 --out %s"):format(quote(me), place()))
    t.eq(status, 0, err)
    t.ok(#said > 150, said)
end)

t.test("recipes/distill_mistral.lua --tiny: both stages, the table, a summary, and again", function()
    local out = place()
    local command = ("%s distill_mistral --tiny --out %s --transfer-steps 4 --lora-steps 4 --eval-rows 2 --sample 4"):format(quote(me), quote(out))
    local status, said, err = shell(command)
    t.eq(status, 0, err)
    t.ok(said:find "teacher" and said:find "attention transfer" and said:find "LoRA", said)
    local s = files.read_json(out .. "/summary.json")
    for _, k in ipairs { "teacher_ppl", "swapped_ppl", "transfer_ppl", "lora_ppl", "window_only_ppl", "transfer_tok_s", "lora_tok_s",
                         "peak_rss_mb" } do
        t.eq(type(s[k]), "number", k)
    end
    t.ok(s.lora_ppl < s.transfer_ppl)
    for _, name in ipairs { "student/student.json", "transfer/losses.svg", "lora/metrics.jsonl", "lora/distill.lua", "lora/recipe.lua" } do
        t.ok(files.exists(out .. "/" .. name), name)
    end
    local model = lc.load(out .. "/student")
    t.ok(model.is_student)
    local again, table_again = shell(command)
    t.eq(again, 0)
    t.eq(table_again, said, "a finished run shows the same table")
    -- the benchmarks run on it too
    local code, json, why = shell(("%s %sbench/train_cpu.lua --model %s/model --seq 64 --steps 1 --json"):format(quote(me), here, quote(out)))
    t.eq(code, 0, why)
    local r = files.parse_json(json, "train_cpu")
    t.ok(r.transfer.tok_s > 0 and r.lora.gemm_share > 0 and r.lora.peak_rss_mb > 0)
    code, json, why = shell(("%s %sbench/decode_cpu.lua --model %s/model --prompt 8 --tokens 8 --runs 1 --positions 20,40 --json")
        :format(quote(me), here, quote(out)))
    t.eq(code, 0, why)
    r = files.parse_json(json, "decode_cpu")
    t.ok(r.softmax.tok_s > 0 and r.linear.read_share > 0 and #r.positions == 2)
end)

t.test("plots: axes, curves and legend; log scale; nothing to draw", function()
    local plot = require "lolcats.plot"
    local x, y = {}, {}
    for i = 1, 200 do x[i], y[i] = i, 1000 / i end
    y[50] = 0 / 0
    local svg = plot.svg({ { name = "a < b", x = x, y = y } }, { title = "t", ylabel = "loss" })
    t.ok(svg:find "a &lt; b" and svg:find "%(log%)" and not svg:find "nan" and not svg:find "inf")
    local text = plot.terminal({ { name = "a", x = x, y = y } }, { width = 60, height = 8 })
    t.ok(text:find "\226[\160-\163]" and text:find "200")
    t.ok(plot.svg({ { name = "one", x = { 1 }, y = { 5 } } }))
    t.ok(plot.terminal({ { name = "none", x = {}, y = {} } }, { width = 40 }))
end)

os.execute("rm -rf " .. quote(root))
t.finish()
