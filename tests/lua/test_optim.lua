-- Optimizers and schedules by the names of a configuration: Adafactor against transformers' (its numbers stand below),
-- timm's cosine against timm 0.4.12, PyTorch's defaults, a state that goes on where it stopped.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local lc = require "lolcats"
local optim = require "lolcats.optim"

-- Four parameters whose values and gradients are written as sines.
local function start()
    local list = {}
    for k, shape in ipairs { { 3, 4 }, { 5 }, { 1, 2, 1, 1 }, { 2, 2, 3 } } do
        local n, v = 1, {}
        for _, x in ipairs(shape) do n = n * x end
        for i = 1, n do v[i] = math.sin(1 + (i - 1) * 0.7) end
        list[k] = { name = "p" .. k, tensor = lc.param(lc.tensor(v, { dtype = "f64" }):reshape(shape)) }
    end
    return list
end

local function gradients(list, step)
    for k, p in ipairs(list) do
        local n, v = p.tensor:numel(), {}
        for i = 1, n do v[i] = math.cos((i - 1) * 1.3 + step + k - 1) end
        lc.no_grad(function()
            p.tensor.grad:copy_(p.tensor:detach() * 0.5 + lc.tensor(v, { dtype = "f64" }):reshape(p.tensor.shape))
        end)
    end
end

local function values(list)
    local out = {}
    for _, p in ipairs(list) do
        for _, v in ipairs(p.tensor:detach():reshape(-1):totable()) do out[#out + 1] = v end
    end
    return out
end

local ADAFACTOR = {
    plain = {
        0.820097126881, 0.969655199659, 0.65334925071, 0.0282960080823, -0.594591781563, -0.955120174036,
        -0.864359089081, -0.364927998589, 0.300565850942, 0.832698811434, 0.966488869953, 0.641004853419,
        0.818678946017, 0.971555863571, 0.657136799921, 0.0440369461854, -0.60040075053, 0.822441881691,
        0.959549303881, 0.827137883947, 0.976802803063, 0.665196697751, 0.0454262430728, -0.60468768379,
        -0.954931166798, -0.870098568756, -0.367253041682, 0.304121641133, 0.828978600935, 0.967908385364,
        0.653649303545,
    },
    moment = {
        0.781708362882, 0.945322754011, 0.614751538494, -0.0195225932773, -0.575578062495, -0.888589815333,
        -0.797618591807, -0.348646146283, 0.251652854008, 0.780333223608, 0.936489267474, 0.62453004734,
        0.790569849982, 0.931396349255, 0.590706995686, 0.0248733149466, -0.563125630416, 0.805111982184,
        0.888584200332, 0.787271523806, 0.913686980741, 0.633773018376, 0.0771714010655, -0.566474880555,
        -0.924553206909, -0.866039486385, -0.357724919531, 0.31863371075, 0.797585873608, 0.899473997081,
        0.606002968062,
    },
    clip = {
        0.782291498227, 0.930347962222, 0.612914514007, 0.00160975763352, -0.55884421141, -0.915600812705,
        -0.830182737194, -0.34441369838, 0.276300224262, 0.800286289422, 0.923378336369, 0.598878360287,
        0.776590436984, 0.932637566922, 0.630670470837, 0.0520317127368, -0.585098069038, 0.779177950278,
        0.914642732503, 0.806956382576, 0.954644355439, 0.647702759997, 0.0491007285865, -0.597325819716,
        -0.919252717754, -0.854019510401, -0.358462120316, 0.287579226992, 0.788572578071, 0.934417390267,
        0.641034746633,
    },
}
local OPTIONS = {
    plain = { lr = 0.01 }, moment = { lr = 0.05, beta1 = 0.9, weight_decay = 0.1, scale_parameter = false },
    clip = { lr = 0.1, clip_threshold = 0.3, decay_rate = -0.5 },
}

for name, want in pairs(ADAFACTOR) do
    t.test("Adafactor, " .. name, function()
        local list = start()
        local o = lc.adafactor(list, OPTIONS[name])
        for step = 1, 6 do
            gradients(list, step)
            o:step()
        end
        t.close(values(list), want, 1e-11)
    end)
end

t.test("Adafactor's state goes on where it stopped", function()
    local a, b = start(), start()
    local o, q = lc.adafactor(a, OPTIONS.moment), lc.adafactor(b, OPTIONS.moment)
    for step = 1, 4 do
        gradients(a, step)
        o:step()
    end
    lc.no_grad(function()
        local from = o:tensors()
        for name, x in pairs(q:tensors()) do x:copy_(from[name]) end
        for i, p in ipairs(b) do p.tensor:detach():copy_(a[i].tensor:detach()) end
    end)
    q.count = o.count
    for step = 5, 6 do
        gradients(b, step)
        q:step()
    end
    t.close(values(b), ADAFACTOR.moment, 1e-11)
end)

t.test("Adafactor in a run, stopped and resumed, is the run", function()
    local dir = os.tmpname()
    os.remove(dir)
    local function go(out, stop)
        lc.manual_seed(3)
        local w = lc.param(lc.randn(4, 6))
        local run = lc.run { out = out, params = { { name = "w", tensor = w } },
                             optim = lc.adafactor { lr = 0.05, beta1 = 0.9 }, max_steps = 8,
                             quiet = true, fresh = false }
        for batch in run:steps() do
            if batch.step == stop then break end
            run:backward((w - 2):square():mean())
        end
        run:finish()
        return lc.files.sha256(w:detach():contiguous())
    end
    local whole = go(dir .. "/a")
    go(dir .. "/b", 5)
    t.eq(go(dir .. "/b"), whole)
    os.execute("rm -rf '" .. dir .. "'")
end)

t.test("timm's cosine", function()
    local at = { 0, 1, 2, 3, 5, 7, 10, 13, 20, 29, 30, 31, 50, 70 }
    for _, case in ipairs {
        { { t_initial = 10 },
          { 0.1, 0.0975528258148, 0.0904508497187, 0.0793892626146, 0.05, 0.0206107373854, 0.1, 0.0793892626146, 0.1,
                                0.00244717418524, 0.1, 0.0975528258148, 0.1, 0.1 } },
        { { t_initial = 10, lr_min = 0.01, warmup_t = 3, warmup_lr_init = 0.001 },
          { 0.001, 0.034, 0.067, 0.0814503363532, 0.055, 0.0285496636468, 0.1, 0.0814503363532, 0.1, 0.0122024567667,
            0.1, 0.0977975432333,
            0.1, 0.1 } },
        { { t_initial = 10, t_mul = 2, decay_rate = 0.5, lr_min = 0.01 },
          { 0.1, 0.0977975432333, 0.0914057647469, 0.0814503363532, 0.055, 0.0285496636468, 0.05, 0.0475476467942,
            0.0275,
            0.00527701233661, 0.025, 0.0249653200045, 0.01375, 0.0125 } },
        { { t_initial = 10, cycle_limit = 2, lr_min = 0.02, warmup_t = 2, warmup_prefix = true, decay_rate = 0.7 },
          { 0, 0.05, 0.1, 0.0980422606518, 0.0835114100917, 0.06, 0.027639320225, 0.0686295824563, 0.0193475241575,
            0.02, 0.02, 0.02, 0.02,
            0.02 } },
    } do
        local s = optim.named_schedule("timm_cosine", case[1]):start(0.1, 100)
        local got = {}
        for i, done in ipairs(at) do got[i] = s:rate(done) end
        t.close(got, case[2], 1e-11)
    end
    local s = lc.timm_cosine():start(1, 8) -- one cycle over the run
    t.close({ s:rate(0), s:rate(4) }, { 1, 0.5 }, 1e-12)
end)

t.test("names of configurations", function()
    for _, name in ipairs { "adamw", "adamw_torch", "adamw_torch_fused" } do
        t.eq(optim.named(name, { lr = 1 }).opts.weight_decay, 0.01)
        t.eq(optim.named(name, { lr = 1, weight_decay = 0 }).opts.weight_decay, 0)
    end
    t.eq({ optim.named("sgd", {}).kind, optim.named("adam", {}).kind, optim.named("adafactor", {}).kind },
         { "sgd", "adam", "adafactor" })
    t.eq(optim.named("adam", {}).opts.weight_decay, 0)
    t.errors(optim.named, "no optimizer 'lion'", "lion")
    local plateau = { mode = "min", factor = 0.5, patience = 3, min_lr = 1e-5 }
    t.eq(optim.named_schedule("reduce_lr_on_plateau", plateau).opts.patience, 3)
    t.eq(optim.named_schedule("cosine_warmup", { num_warmup_steps = 5, num_training_steps = 50, patience = 3 }).opts,
         { warmup = 5, total = 50, cycles = 0.5 })
    t.eq(optim.named_schedule("linear", plateau).kind, "linear_decay")
    t.eq(optim.named_schedule(nil).kind, "constant")
    t.eq(optim.named_schedule("none").kind, "constant")
    t.errors(optim.named_schedule, "no schedule 'expo'", "expo")
end)

t.finish()
