-- optim.lua: optimizers, schedules, accumulation and clipping against thirty steps of PyTorch on a small quartic
-- problem.
local lc = require "lolcats"
local files = require "lolcats.files"
local optim = require "lolcats.optim"

-- Hyper-parameters that the file names but does not list.
local NAMED = {
    adamw_wd0 = { "adamw", {} },
    ["adamw_wd0.01"] = { "adamw", { weight_decay = 0.01 } },
    ["adamw_wd0.3_betas"] = { "adamw", { weight_decay = 0.3, betas = { 0.8, 0.95 }, eps = 1e-6 } },
    adam = { "adam", {} },
    adam_l2 = { "adam", { weight_decay = 0.1 } },
    sgd = { "sgd", {} },
    sgd_wd = { "sgd", { weight_decay = 0.1 } },
    sgd_momentum = { "sgd", { momentum = 0.9 } },
}

-- The optimizer of a run: named above, or spelled out ("AdamW lr 0.05 wd 0, ...").
local function make_optimizer(run)
    local known = NAMED[run.optimizer]
    if known then
        local opts = { lr = run.rows[1].lr }
        for k, v in pairs(known[2]) do opts[k] = v end
        return lc[known[1]](opts)
    end
    local kind, lr = run.optimizer:match "^(%a+) lr ([%d.e-]+)"
    if not kind then return nil end
    local decay = kind ~= "SGD" and tonumber(run.optimizer:match " wd ([%d.e-]+)") or nil
    return optim[kind:lower()] { lr = tonumber(lr), weight_decay = decay }
end

local function make_schedule(text)
    if not text then return lc.constant() end
    local kind = text:match "get_scheduler%('([%w_]+)'"
    if kind then
        local warmup = tonumber(text:match "num_warmup_steps=(%d+)")
        local total = tonumber(text:match "num_training_steps=(%d+)")
        local make = ({ cosine = optim.cosine, linear = optim.linear_decay, constant = optim.constant,
                        constant_with_warmup = optim.constant })[kind]
        return make and make { warmup = warmup, total = total }
    end
    local json = text:match "ReduceLROnPlateau (%b{})"
    return json and lc.plateau(files.parse_json(json, "the schedule"))
end

local function problem(p)
    local how = { dtype = "f64" }
    local t = { a = lc.tensor(p.a, how), b = lc.tensor(p.b, how), c = lc.tensor(p.c, how) }
    t.x, t.y = lc.param(lc.tensor(p.x0, how)), lc.param(lc.tensor(p.y0, how))
    function t.loss()
        local d, e = t.a:matmul(t.x) - t.b, t.y - t.c
        return d:square():sum() * 0.5 + e:square():sum() + (t.x:sum() * t.y:sum()):square() * 0.1
    end
    return t
end

local function compare(c, label, x, want)
    c.close(label, x:reshape(-1), lc.tensor(want, { dtype = "f64" }), 1e-12, 1e-13)
end

local function one_step(p, o, run, lr, micro)
    o:zero_grad()
    local loss = 0
    for _ = 1, micro do
        loss = loss + lc.scope(function()
            local l = p.loss() / micro
            l:backward()
            return l:item()
        end)
    end
    local limit, norm = tonumber(run.optimizer:match "clip_grad_norm_ ([%d.]+)"), nil
    if limit then norm = o:clip(limit) end
    o:step(lr)
    return loss, norm
end

local function run_case(c, p, run)
    local o, s = make_optimizer(run), make_schedule(run.scheduler)
    if not o or not s then
        c.skip("unknown optimizer or schedule: " .. run.optimizer .. " " .. tostring(run.scheduler))
    end
    o:attach { p.x, p.y }
    s:start(o.lr, run.rows and #run.rows)
    local micro = tonumber(run.optimizer:match "accumulated over (%d+)") or 1
    for i = 1, run.rows and #run.rows or #run.lr do
        local row, lr = run.rows and run.rows[i], s:rate(i - 1)
        local want_lr = row and row.lr or run.lr[i]
        c.near("lr " .. i, lr, want_lr, 1e-12 * math.max(want_lr, 1e-12))
        local loss, norm = one_step(p, o, run, lr, micro)
        if row then
            c.near("loss " .. i, loss, row.loss_before, 1e-12 * math.abs(row.loss_before) + 1e-13)
            if norm then c.near("norm " .. i, norm, row.grad_norm_before_clip, 1e-12 * row.grad_norm_before_clip) end
            if row.grad_x then
                compare(c, "grad x " .. i, p.x.grad, row.grad_x)
                compare(c, "grad y " .. i, p.y.grad, row.grad_y)
            end
            compare(c, "x " .. i, p.x, row.x)
            compare(c, "y " .. i, p.y, row.y)
        end
        local metric = run.metric and run.metric[i]
        if metric then s:observe(metric == "nan" and 0 / 0 or metric) end
    end
    if run.last_x then
        compare(c, "x at the end", p.x, run.last_x)
        compare(c, "y at the end", p.y, run.last_y)
    end
end

-- AdamW with parameters, gradients and moments in bfloat16, in both of PyTorch's ways: equal to the last bit.
local function bf16_case(c, json, way)
    local w = lc.param(lc.tensor(json.start, { dtype = "f32" }))
    local o = lc.adamw({ w }, { lr = tonumber(json.how:match "lr ([%d.e-]+)"), rounded = way })
    for _, g in ipairs(json.gradients) do
        o.flat.grad:copy_(lc.tensor(g, { dtype = "f32" }))
        o:step()
    end
    local got = { w = w:detach(), m = o.flat.m, v = o.flat.v }
    for name, want in pairs(json.result[way]) do
        local x = got[name:match "^exp_avg_sq" and "v" or name:match "^exp_avg" and "m" or name]
        if x and type(want) == "table" then
            c.close(name, x:reshape(-1), lc.tensor(want, { dtype = "f32" }), 0, 1e-30)
        end
    end
end

return function(dir, T)
    if files.exists(dir .. "/adamw_bf16.json") then
        local json = files.read_json(dir .. "/adamw_bf16.json")
        for way in pairs(json.result) do
            T.case("optim/adamw_bf16 " .. way, function(c) bf16_case(c, json, way) end)
        end
    end
    local json = files.read_json(dir .. "/optim.json")
    local names = {}
    for name in pairs(json.runs) do names[#names + 1] = name end
    table.sort(names)
    for _, name in ipairs(names) do
        T.case("optim/" .. name, function(c) run_case(c, problem(json.problem), json.runs[name]) end)
    end
end
