-- optim.lua: optimizers (AdamW, Adam, SGD, Adafactor) over one flat buffer of parameters, gradient clipping, and
-- learning-rate schedules: constant, linear and cosine with warm-up by Hugging Face's formulas, timm's cosine, plateau
-- by PyTorch's ReduceLROnPlateau. Each can hand out its whole state as plain values and take it back, which is what an
-- exact resume needs.
local lc = require "lolcats"
local nn = require "lolcats.nn"

local M = {}

local function check_options(what, opts, known)
    for k in pairs(opts) do
        if known[k] == nil then
            local names = {}
            for name in pairs(known) do names[#names + 1] = name end
            table.sort(names)
            lc.fail("%s has no option '%s'; it has %s", what, tostring(k), table.concat(names, ", "))
        end
    end
end

local function check_number(what, name, v, low, high)
    if type(v) ~= "number" or v ~= v or v < low or v > (high or math.huge) then
        lc.fail("%s: %s must be a number %s, got %s", what, name,
                high and ("from %g to %g"):format(low, high) or ("of at least %g"):format(low), tostring(v))
    end
end

-- ---- optimizers ---------------------------------------------------------------------------------------------------
local Optim = {}
Optim.__index = Optim

-- Tensors, or records {name=, tensor=}, as records.
local function named(params)
    local out = {}
    for i, p in ipairs(params) do
        if lc.is_tensor(p) then
            out[i] = { name = p.name ~= "" and p.name or ("param.%d"):format(i), tensor = p }
        elseif type(p) == "table" and lc.is_tensor(p.tensor) then
            out[i] = { name = p.name or ("param.%d"):format(i), tensor = p.tensor }
        else
            lc.fail("parameter %d: expected a tensor or {name =, tensor =}, got a %s", i, type(p))
        end
        if not out[i].tensor.requires_grad then
            lc.fail("parameter %d (%s) does not require a gradient; lc.param(x) makes one that does", i, out[i].name)
        end
    end
    return out
end

--- Takes the parameters to train: a list of tensors or of {name =, tensor =}. They become views of one buffer.
function Optim:attach(params)
    if self.flat then lc.fail("this optimizer has its parameters already; make another one") end
    self.params = named(params)
    self.flat = nn.flatten(self.params)
    self.count = 0
    if self.on_attach then self.on_attach(self) end
    return self
end

-- A buffer's values as bfloat16 has them.
local function round_(x) lc.no_grad(lc.scope, function() x:copy_(x:to("bf16"):to { dtype = x.dtype }) end) end

--- Rounds the gradients where the optimizer's state is kept in bfloat16 (rounded =): what a sum over micro-batches
--- loses.
function Optim:round_gradients()
    if self.rounded then round_(self.flat.grad) end
end

local function attached(self)
    if not self.flat then
        lc.fail("this optimizer has no parameters yet: %s(params, {...}), or give it to lc.run", self.kind)
    end
    return self.flat
end

function Optim:zero_grad() attached(self):zero_grad() end

--- The 2-norm of all gradients.
function Optim:grad_norm() return attached(self):grad_norm() end

--- Scales all gradients so that their norm is at most `limit`, as torch's clip_grad_norm_; returns the norm before.
function Optim:clip(limit, norm)
    local flat = attached(self)
    check_number(self.kind, "clip", limit, 0)
    norm = norm or flat:grad_norm()
    local scale = limit / (norm + 1e-6)
    if scale < 1 then flat.grad:scale_(scale) end
    return norm
end

--- One update with learning rate `lr` (its own by default); gradients stay as they are.
function Optim:step(lr)
    local flat = attached(self)
    self:apply(flat, lr or self.lr, self.count + 1)
    self.count = self.count + 1
end

--- Tensors of the state by name, each a view of a whole buffer.
function Optim:tensors()
    local flat = attached(self)
    if self.own_tensors then return self.own_tensors(self) end
    return { m = flat.m, v = flat.v }
end

--- What the optimizer is, for comparing runs.
function Optim:describe()
    local out = { kind = self.kind, lr = self.lr }
    for k, v in pairs(self.opts) do out[k] = v end
    return out
end

local function adam_step(self, flat, lr, step)
    lc.adamw_(flat.data, flat.grad, flat.m, flat.v, lr, step, self.args)
end

-- PyTorch's AdamW on bfloat16 parameters and moments: "fused" computes an update in f32 and rounds what it stores,
-- "loop" rounds after every operation, so that a second moment may stand still.
local function rounded_step(self, flat, lr, step)
    local a = self.args
    round_(flat.grad)
    if self.rounded == "fused" then
        adam_step(self, flat, lr, step)
    else
        lc.no_grad(lc.scope, function()
            local p, g, m, v = flat.data, flat.grad, flat.m, flat.v
            local function r(x) return x:to("bf16"):to { dtype = p.dtype } end
            if a.weight_decay ~= 0 then
                if a.decoupled then p:copy_(r(p * (1 - lr * a.weight_decay))) else g = r(g + p * a.weight_decay) end
            end
            m:copy_(r(m + (g - m) * (1 - a.beta1)))
            v:copy_(r(r(v * a.beta2) + g * g * (1 - a.beta2)))
            local denom = r(r(r(v:sqrt()) / math.sqrt(1 - a.beta2 ^ step)) + a.eps)
            p:copy_(r(p - m / denom * (lr / (1 - a.beta1 ^ step))))
        end)
    end
    for _, x in ipairs { flat.data, flat.m, flat.v } do round_(x) end
end

local function sgd_step(self, flat, lr, step)
    lc.sgd_(flat.data, flat.grad, self.args.momentum ~= 0 and flat.m or nil, lr, step, self.args)
end

-- name(params, opts) makes a ready optimizer, name(opts) one that lc.run will attach.
local function maker(kind, known, finish)
    return function(params, opts)
        if opts == nil and (params == nil or (type(params) == "table" and params[1] == nil)) then
            params, opts = nil, params or {}
        end
        opts = opts or {}
        local what = "lc." .. kind
        if type(opts) ~= "table" then
            lc.fail("%s: options are a table like {lr = 1e-3}, got a %s", what, type(opts))
        end
        check_options(what, opts, known)
        local set = {}
        for k, default in pairs(known) do
            set[k] = opts[k]
            if set[k] == nil then set[k] = default end
        end
        check_number(what, "lr", set.lr, 0)
        check_number(what, "weight_decay", set.weight_decay, 0)
        local self = setmetatable({ kind = kind, lr = set.lr, opts = set }, Optim)
        finish(self, set, what)
        if params then self:attach(params) end
        return self
    end
end

local ADAM = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0, rounded = false }

local function adam(decoupled)
    return function(self, set, what)
        local b = set.betas
        if type(b) ~= "table" or #b ~= 2 then lc.fail("%s: betas are two numbers like {0.9, 0.999}", what) end
        check_number(what, "betas[1]", b[1], 0, 1)
        check_number(what, "betas[2]", b[2], 0, 1)
        check_number(what, "eps", set.eps, 0)
        self.args = { beta1 = b[1], beta2 = b[2], eps = set.eps, weight_decay = set.weight_decay,
                      decoupled = decoupled }
        self.apply = adam_step
        if set.rounded then
            if set.rounded ~= "fused" and set.rounded ~= "loop" then
                lc.fail("%s: rounded is 'fused' or 'loop' (which of PyTorch's), not '%s'", what, tostring(set.rounded))
            end
            self.rounded, self.apply = set.rounded, rounded_step
            self.on_attach = function(o) round_(o.flat.data) end
        else
            set.rounded = nil
        end
    end
end

--- AdamW. lc.adamw{lr = 1e-3, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0} for lc.run, or lc.adamw(params,
--- {...}) for a loop of your own: optim:zero_grad(), optim:clip(1), optim:step(). (weight_decay is 0 here, 0.01 in
--- PyTorch.) rounded = "fused" or "loop": parameters, gradients and moments are kept to bfloat16's digits, as the
--- reference has them, for one or the other of PyTorch's implementations.
M.adamw = maker("adamw", ADAM, adam(true))

--- Adam, with weight_decay added to the gradient (L2). Options and use as lc.adamw.
M.adam = maker("adam", ADAM, adam(false))

--- SGD. Options: lr, momentum (0), dampening (0), weight_decay (0), nesterov. Use as lc.adamw.
M.sgd = maker("sgd", { lr = 1e-2, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false },
              function(self, set, what)
    check_number(what, "momentum", set.momentum, 0)
    if set.nesterov and (set.momentum == 0 or set.dampening ~= 0) then
        lc.fail("%s: nesterov needs a momentum and no dampening", what)
    end
    self.args = { momentum = set.momentum, dampening = set.dampening, weight_decay = set.weight_decay,
                  nesterov = set.nesterov }
    self.apply = sgd_step
end)

--- Adafactor as Hugging Face's with relative_step off. Options: lr, eps ({1e-30, 1e-3}), clip_threshold (1), decay_rate
--- (-0.8), beta1 (0: no first moment), weight_decay (0), scale_parameter (true). Use as lc.adamw.
M.adafactor = maker("adafactor", {
    lr = 1e-3, eps = { 1e-30, 1e-3 }, clip_threshold = 1, decay_rate = -0.8, beta1 = 0, weight_decay = 0,
    scale_parameter = true,
}, function(self, set, what)
    if type(set.eps) ~= "table" or #set.eps ~= 2 then lc.fail("%s: eps are two numbers like {1e-30, 1e-3}", what) end
    check_number(what, "clip_threshold", set.clip_threshold, 0)
    check_number(what, "beta1", set.beta1, 0, 1)
    if type(set.decay_rate) ~= "number" or not (set.decay_rate < 0) then
        lc.fail("%s: decay_rate must be below 0", what)
    end
    local step = require "lolcats.train.adafactor"
    self.args = { eps = set.eps, clip_threshold = set.clip_threshold, decay_rate = set.decay_rate,
                  weight_decay = set.weight_decay,
                  beta1 = set.beta1 > 0 and set.beta1 or nil, scale_parameter = set.scale_parameter }
    self.on_attach, self.own_tensors, self.apply = step.attach, step.tensors, step.step
end)

local OPTIMIZERS = { sgd = M.sgd, adam = M.adam, adamw = M.adamw, adamw_torch = M.adamw, adamw_torch_fused = M.adamw,
                     adafactor = M.adafactor }

local function names_of(t)
    local out = {}
    for k in pairs(t) do out[#out + 1] = k end
    table.sort(out)
    return table.concat(out, ", ")
end

--- An optimizer by the name that a configuration gives it: sgd, adam, adamw (adamw_torch, adamw_torch_fused),
--- adafactor. Options that are not given have PyTorch's defaults: a weight_decay of 0.01 for AdamW.
function M.named(name, opts)
    local make = OPTIMIZERS[name]
    if not make then lc.fail("there is no optimizer '%s'; there are %s", tostring(name), names_of(OPTIMIZERS)) end
    local set = {}
    for k, v in pairs(opts or {}) do set[k] = v end
    if make == M.adamw and set.weight_decay == nil then set.weight_decay = 0.01 end
    return make(set)
end

-- ---- schedules ----------------------------------------------------------------------------------------------------
-- A schedule turns the number of updates done (from 0) into the next one's learning rate. `start(base, total)` is
-- called once; `observe(metric)` after each evaluation; state() and restore(t) carry what rate() depends on.
local Schedule = {}
Schedule.__index = Schedule

function Schedule:start(base, total)
    self.base = base
    self.total = self.opts.total or total
    if self.needs_total and (self.total or 0) < 1 then
        lc.fail("lc.%s needs to know the number of updates: give total =", self.kind)
    end
    return self
end
function Schedule:rate(done) return self.base * self.factor(self, done) end
function Schedule:observe() end
function Schedule:state() return {} end
function Schedule:restore() end
function Schedule:describe()
    local out = { kind = self.kind }
    for k, v in pairs(self.opts) do out[k] = v end
    return out
end

local function schedule(kind, known, factor, needs_total)
    return function(opts)
        opts = opts or {}
        check_options("lc." .. kind, opts, known)
        local set = {}
        for k, default in pairs(known) do
            set[k] = opts[k]
            if set[k] == nil and default ~= false then set[k] = default end
        end
        check_number("lc." .. kind, "warmup", set.warmup or 0, 0)
        return setmetatable({ kind = kind, opts = set, factor = factor, needs_total = needs_total }, Schedule)
    end
end

--- The learning rate as it is, after `warmup` updates that lead up to it in a line.
M.constant = schedule("constant", { warmup = 0, total = false }, function(self, done)
    local w = self.opts.warmup
    return done < w and done / math.max(1, w) or 1
end)

--- Up in a line over `warmup` updates, then down in a line to 0 at `total` (the run's number of updates).
M.linear_decay = schedule("linear_decay", { warmup = 0, total = false }, function(self, done)
    local w = self.opts.warmup
    if done < w then return done / math.max(1, w) end
    return math.max(0, (self.total - done) / math.max(1, self.total - w))
end, true)

--- Up in a line over `warmup` updates, then down along `cycles` (0.5) waves of a cosine to `total`.
M.cosine = schedule("cosine", { warmup = 0, total = false, cycles = 0.5 }, function(self, done)
    local w = self.opts.warmup
    if done < w then return done / math.max(1, w) end
    local progress = (done - w) / math.max(1, self.total - w)
    return math.max(0, 0.5 * (1 + math.cos(math.pi * self.opts.cycles * 2 * progress)))
end, true)

--- timm's cosine: from the learning rate to lr_min over cycles of t_initial updates (the run's, without), each
--- cycle_mul times as long as the one before and cycle_decay times as high; after cycle_limit cycles (0: never) lr_min.
--- Before them warmup_t updates that lead up from warmup_lr_init; with warmup_prefix the cycles begin after those.
M.timm_cosine = schedule("timm_cosine", {
    t_initial = false, lr_min = 0, cycle_mul = 1, cycle_decay = 1, cycle_limit = 0, warmup_t = 0, warmup_lr_init = 0,
    warmup_prefix = false,
    total = false,
}, function(self, t)
    local o, base = self.opts, self.base
    if base == 0 then return 0 end
    if t < o.warmup_t then return (o.warmup_lr_init + t * (base - o.warmup_lr_init) / o.warmup_t) / base end
    if o.warmup_prefix then t = t - o.warmup_t end
    local length, mul = o.t_initial or self.total, o.cycle_mul
    local cycle, span, at
    if mul == 1 then
        cycle, span = math.floor(t / length), length
        at = t - length * cycle
    else
        cycle = math.floor(math.log(1 - t / length * (1 - mul)) / math.log(mul))
        span = mul ^ cycle * length
        at = t - (1 - mul ^ cycle) / (1 - mul) * length
    end
    if o.cycle_limit > 0 and cycle >= o.cycle_limit then return o.lr_min / base end
    local gamma = o.cycle_decay ^ cycle
    local low = o.lr_min * gamma
    return (low + 0.5 * (base * gamma - low) * (1 + math.cos(math.pi * at / span))) / base
end, true)

local Plateau = setmetatable({}, { __index = Schedule })
Plateau.__index = Plateau

function Plateau:start(base)
    self.base, self.lr = base, self.lr or base
    return self
end
function Plateau:rate() return self.lr end

local function better(self, metric) -- a NaN never is
    local o, best = self.opts, self.best
    if not best then return metric == metric end
    if o.mode == "min" then
        return metric < (o.threshold_mode == "rel" and best * (1 - o.threshold) or best - o.threshold)
    end
    return metric > (o.threshold_mode == "rel" and best * (1 + o.threshold) or best + o.threshold)
end

function Plateau:observe(metric)
    local o = self.opts
    if better(self, metric) then
        self.best, self.bad = metric, 0
    else
        self.bad = self.bad + 1
    end
    if self.cool > 0 then
        self.cool, self.bad = self.cool - 1, 0
    end
    if self.bad > o.patience then
        local lower = math.max(self.lr * o.factor, o.min_lr)
        if self.lr - lower > o.eps then self.lr = lower end
        self.cool, self.bad = o.cooldown, 0
    end
end
function Plateau:state() return { lr = self.lr, best = self.best, bad = self.bad, cool = self.cool } end
function Plateau:restore(s) self.lr, self.best, self.bad, self.cool = s.lr, s.best, s.bad, s.cool end

--- Multiplies the learning rate by `factor` (0.1) when the metric of more than `patience` (10) evaluations was no
--- better than the best. Also mode ("min"), threshold (1e-4), threshold_mode ("rel"), cooldown (0), min_lr (1e-5;
--- PyTorch has 0), eps (1e-8).
function M.plateau(opts)
    opts = opts or {}
    local known = { factor = 0.1, patience = 10, mode = "min", threshold = 1e-4, threshold_mode = "rel", cooldown = 0,
                    min_lr = 1e-5,
                    eps = 1e-8 }
    check_options("lc.plateau", opts, known)
    local set = {}
    for k, default in pairs(known) do
        set[k] = opts[k]
        if set[k] == nil then set[k] = default end
    end
    if set.mode ~= "min" and set.mode ~= "max" then
        lc.fail("lc.plateau: mode is 'min' or 'max', not '%s'", tostring(set.mode))
    end
    check_number("lc.plateau", "factor", set.factor, 0, 1)
    return setmetatable({ kind = "plateau", opts = set, bad = 0, cool = 0 }, Plateau)
end

-- Names of schedules in configurations; for each what its keys are called here.
local WARM = { num_warmup_steps = "warmup", num_training_steps = "total" }
local PLATEAU_KEYS, TIMM_KEYS = {}, { t_mul = "cycle_mul", decay_rate = "cycle_decay" }
for word in ("factor patience mode threshold threshold_mode cooldown min_lr eps"):gmatch "%S+" do
    PLATEAU_KEYS[word] = word
end
for word in ("t_initial lr_min cycle_mul cycle_decay cycle_limit warmup_t warmup_lr_init warmup_prefix"):gmatch "%S+" do
    TIMM_KEYS[word] = word
end
local WAVES = { num_warmup_steps = "warmup", num_training_steps = "total", num_cycles = "cycles" }
local SCHEDULES = {
    none = { M.constant, {} }, constant = { M.constant, { num_warmup_steps = "warmup" } },
    linear = { M.linear_decay, WARM }, linear_warmup = { M.linear_decay, WARM },
    cosine = { M.cosine, WAVES }, cosine_warmup = { M.cosine, WAVES }, timm_cosine = { M.timm_cosine, TIMM_KEYS },
}

--- A schedule by the name that a configuration gives it (plateau, reduce_lr_on_plateau, cosine_warmup, linear_warmup,
--- linear, timm_cosine, none) with that configuration's keys; keys of another schedule are left out.
function M.named_schedule(name, opts)
    local row = SCHEDULES[name or "none"]
    if name == "plateau" or name == "reduce_lr_on_plateau" then row = { M.plateau, PLATEAU_KEYS } end
    if not row then
        lc.fail("there is no schedule '%s'; there are plateau, reduce_lr_on_plateau, %s", tostring(name),
                names_of(SCHEDULES))
    end
    local set = {}
    for k, v in pairs(opts or {}) do
        if row[2][k] then set[row[2][k]] = v end
    end
    return row[1](set)
end

--- A schedule from what a recipe may write: a schedule, or one of the names "constant", "linear", "cosine", "plateau".
function M.schedule(v)
    if v == nil then return M.constant() end
    if type(v) == "string" then
        local make = ({ constant = M.constant, linear = M.linear_decay, cosine = M.cosine, plateau = M.plateau })[v]
        if not make then lc.fail("there is no schedule '%s'; there are constant, linear, cosine, plateau", v) end
        return make()
    end
    if type(v) ~= "table" or not v.rate then
        lc.fail("schedule: expected lc.plateau{}, lc.cosine{}, ... or a name, got a %s", type(v))
    end
    return v
end

function M.is_optim(v) return getmetatable(v) == Optim end

M.Optim = Optim
return M
