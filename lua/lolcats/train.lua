-- train.lua: lc.run, the loop around a user's loss: `for batch in run:steps() do run:backward(loss) end`. It owns the order of
-- rows, a scope per micro-step, accumulation, clipping, the optimizer and its schedule, evaluation, checkpoints, exact resume,
-- metrics, progress and plots. Everything a resume needs is noted at one moment, right after an update (mark), and only that
-- is ever written.
local lc = require "lolcats"
local files = require "lolcats.files"
local bridge = require "lolcats.core.ffi"
local scope = require "lolcats.core.scope"
local cli = require "lolcats.cli"
local log = require "lolcats.log"
local optim = require "lolcats.optim"
local folder = require "lolcats.train.folder"

local M = {}

local Run = {}
Run.__index = Run

-- ---- options ------------------------------------------------------------------------------------------------------
local KNOWN = {
    name = "string", out = "string", data = "table", params = "table", optim = "table", schedule = "any", epochs = "number",
    max_steps = "number", accumulate = "number", batch = "number", clip = "number", eval = "function", eval_every = "number",
    metric = "string", mode = "string", save_every = "number", save_seconds = "number", load_best = "boolean", seed = "number",
    fresh = "boolean", model = "table", order = "table", quiet = "boolean", neutral = "table", settings = "table",
    drop_leftover = "boolean",
}

local function check_options(opts)
    if type(opts) ~= "table" then lc.fail("lc.run: a table of options is needed") end
    for k, v in pairs(opts) do
        local kind = KNOWN[k]
        if not kind then
            local near = bridge.nearest(tostring(k), KNOWN)
            lc.fail("lc.run has no option '%s'%s", tostring(k), near and (" (did you mean '%s'?)"):format(near) or "")
        end
        if kind ~= "any" and type(v) ~= kind then lc.fail("lc.run: %s must be a %s, got a %s", k, kind, type(v)) end
        if kind == "number" and (v ~= v or v < 0) then lc.fail("lc.run: %s must not be negative, got %s", k, tostring(v)) end
    end
    for _, k in ipairs { "accumulate", "batch", "eval_every", "save_every", "max_steps" } do
        local v = opts[k]
        if v and (v < 1 or v % 1 ~= 0) then lc.fail("lc.run: %s must be a whole number of at least 1, got %s", k, tostring(v)) end
    end
    if not opts.params or #opts.params == 0 then lc.fail("lc.run: params is empty; there is nothing to train") end
    if not optim.is_optim(opts.optim) then lc.fail("lc.run needs optim = lc.adamw{lr = ...} (or lc.adam, lc.sgd)") end
    if opts.mode and opts.mode ~= "min" and opts.mode ~= "max" then lc.fail("lc.run: mode is 'min' or 'max'") end
    if not opts.data and not opts.max_steps then lc.fail("lc.run: without data, max_steps says how long to train") end
    if opts.eval_every and not opts.eval then lc.fail("lc.run: eval_every needs eval = function() ... return loss end") end
end

-- How many micro-batches an epoch has and how many updates there will be.
local function plan(self, opts)
    local data = opts.data
    if not data then
        self.per_epoch, self.updates = math.huge, opts.max_steps
        return
    end
    local rows = opts.order and #opts.order or data.rows
    if type(rows) ~= "number" then lc.fail("lc.run: data must be what lc.data returns (or have .rows and :batch(list))") end
    self.per_epoch = math.floor(rows / self.batch)
    if self.per_epoch == 0 then lc.fail("lc.run: a batch of %d rows needs as many rows of data; there are %d", self.batch, rows) end
    local epochs = opts.epochs or (opts.max_steps and math.huge or 1)
    self.updates = math.floor(epochs * self.per_epoch / self.accumulate)
    if opts.max_steps then self.updates = math.min(self.updates, opts.max_steps) end
    if self.updates == 0 then
        lc.fail("lc.run: %d rows over %g epochs in batches of %d are fewer than one update of %d accumulated batches", rows, epochs,
                self.batch, self.accumulate)
    end
    self.epochs = math.ceil(self.updates * self.accumulate / self.per_epoch)
end

local function names_digest(params)
    local parts = {}
    for i, p in ipairs(params) do parts[i] = p.name .. "[" .. table.concat(p.tensor.shape, ",") .. "]" .. p.tensor.dtype end
    return files.sha256(table.concat(parts, "\n"))
end

-- What makes two runs the same, beyond the recipe's arguments.
local function settings_of(self, opts)
    local data = opts.data
    return {
        optim = self.optim:describe(), schedule = self.schedule:describe(), accumulate = self.accumulate, batch = self.batch,
        clip = opts.clip, updates = self.updates, seed = self.seed, parameters = #self.optim.params,
        parameters_sha256 = names_digest(self.optim.params), data = data and data.describe and data:describe() or nil,
        eval_every = opts.eval and self.eval_every or nil, order = opts.order and files.sha256(table.concat(opts.order, " ")) or nil,
        more = opts.settings,
    }
end

-- ---- start --------------------------------------------------------------------------------------------------------
local function fresh_wanted(opts)
    if opts.fresh ~= nil then return opts.fresh end
    local values = cli.current and cli.current.values
    return values and values.fresh == true or false
end

local function resume(self, state)
    folder.load_last(self.folder, self.optim)
    self.optim.count = state.step
    self.step, self.finished, self.eval_due = state.step, state.finished, state.eval_due
    self.best, self.seconds, self.tokens = state.best, state.seconds, state.tokens
    if self.best == files.null then self.best = nil end
    self.schedule:restore(state.schedule)
    lc.set_rng_state(state.rng)
    self.metrics = folder.metrics(self.folder, state.metrics_bytes)
    self.resumed = state.step
    self:mark()
    if self.finished then
        log.say("%s: finished already, %d updates (%s)", self.name, self.step, self.folder)
        self:take_best()
    elseif self.step > 0 then
        log.say("%s: going on after update %d of %d (%s)", self.name, self.step, self.updates, self.folder)
    end
end

local function begin(self, opts)
    self.step, self.seconds, self.tokens = 0, 0, 0
    if opts.seed then lc.manual_seed(opts.seed) end
    folder.describe(self.folder, self.request)
    self.metrics = folder.metrics(self.folder, 0)
    self:mark()
    self:save()
end

--- A training run. Options: name, out (the run's files go to out/name), data (of lc.data), params, optim, schedule, epochs or
--- max_steps (updates), batch (rows a micro-batch, 1), accumulate (1), clip (gradient norm), eval (function: a number, or a table
--- of them), eval_every (100 updates), metric ("loss") and mode ("min") that name the best, load_best (the best parameters at the
--- end; true when there is eval), save_every (100 updates) and save_seconds (120), seed, order (rows, instead of shuffling),
--- model (its layers are looked at when a loss is not finite), fresh, quiet, settings (more values that a resume compares),
--- neutral (names of arguments that may change on a resume), drop_leftover (an epoch's end forgets gradients that made no update
--- yet, as the reference does). Then: for batch in run:steps() do run:backward(loss) end.
function M.run(opts)
    check_options(opts)
    local values = cli.current and cli.current.values or {}
    local out = opts.out or values.out
    if type(out) ~= "string" or out == "" then lc.fail("lc.run needs out = a folder for the run's files") end
    local self = setmetatable({
        opts = opts, name = opts.name or "train", optim = opts.optim, accumulate = opts.accumulate or 1, batch = opts.batch or 1,
        data = opts.data, eval_every = opts.eval_every or 100, save_every = opts.save_every or 100, save_seconds = opts.save_seconds or 120,
        metric = opts.metric or "loss", mode = opts.mode or "min", seed = opts.seed or 0, sums = {}, unread = {}, order = {}, micro = 0,
    }, Run)
    plan(self, opts)
    self.optim:attach(opts.params)
    self.schedule = optim.schedule(opts.schedule)
    self.schedule:start(self.optim.lr, self.updates)
    self.folder = out .. "/" .. self.name
    local fresh = fresh_wanted(opts)
    folder.open_out(out, fresh)
    files.make_dirs(self.folder)
    self.request = folder.request(self.name, settings_of(self, opts))
    if fresh then folder.clear(self.folder) end
    local state = folder.read_state(self.folder)
    M.current = self
    if state then
        folder.compare(self.folder, state.request, files.parse_json(files.to_json(self.request), "request"), opts.neutral)
        resume(self, state)
    else
        begin(self, opts)
    end
    self.session_start, self.last_save, self.session_seconds, self.session_tokens = lc.now(), lc.now(), 0, 0
    self.progress = log.progress(self.name, { quiet = opts.quiet })
    self.optim:zero_grad()
    return self
end

-- ---- the state of the run -----------------------------------------------------------------------------------------
--- Notes the state that belongs to the parameters as they stand.
function Run:mark()
    self.marked = {
        version = folder.VERSION, step = self.step, finished = self.finished or false, eval_due = self.eval_due or false,
        best = self.best, schedule = self.schedule:state(), rng = lc.rng_state(), metrics_bytes = self.metrics.bytes,
        seconds = self.seconds, tokens = self.tokens, request = self.request,
    }
end

--- Writes parameters, moments and the state last noted.
function Run:save()
    local ok, problem = pcall(folder.save_last, self.folder, self.optim, self.marked)
    if not ok then
        local have = self.saved and ("; the checkpoint of update %d stands as it was"):format(self.saved) or ""
        if bridge.is_error(problem) then problem.message = ("cannot save %s: %s%s"):format(self.folder, problem.message, have) end
        error(problem, 0)
    end
    self.saved, self.last_save = self.marked.step, lc.now()
end

function Run:take_best()
    local wanted = self.opts.load_best
    if wanted == nil then wanted = self.opts.eval ~= nil end
    if not wanted then return end
    local state = folder.load_best(self.folder, self.optim)
    if state then self.best_loaded = state.step end
end

--- Called when Ctrl-C ended the program's script: writes the last noted state. Returns what to tell the user.
function Run:interrupted()
    if self.finished or self.closed then return nil end
    if self.progress then self.progress:close() end
    scope.recover(0)
    local note
    if self.updating then -- struck inside an update: parameters and state may not fit together
        note = ("the checkpoint of update %d stands"):format(self.saved or 0)
    elseif self.saved ~= self.marked.step or self.marked.eval_due then
        local ok, problem = pcall(self.save, self)
        if not ok then return ("the state could not be saved: %s"):format(tostring(problem)) end
        note = ("update %d of %d is saved in %s"):format(self.marked.step, self.updates, self.folder)
    else
        note = ("update %d of %d is saved in %s"):format(self.saved, self.updates, self.folder)
    end
    return note .. "; the same command goes on from there"
end

-- ---- what goes wrong ----------------------------------------------------------------------------------------------
local function bad(t) return lc.no_grad(lc.scope, function() return lc.count_nonfinite(t:detach()):item() > 0 end) end

-- Where numbers stopped being numbers: a parameter, a layer of the model, or a parameter's gradient.
local function culprit(self)
    local params = self.optim.params
    for _, p in ipairs(params) do
        if bad(p.tensor) then return ("the parameter %s holds values that are not finite"):format(p.name) end
    end
    local model, batch = self.opts.model, self.current_batch
    if model and batch and lc.is_tensor(batch.ids) and model.forward then
        local found
        pcall(lc.no_grad, lc.scope, function()
            local hidden = {}
            model:forward(batch.ids, { hidden = hidden })
            for i, layer in ipairs(model.layers or {}) do
                if not found and hidden[i] and bad(hidden[i]) then found = layer.name or ("layer %d"):format(i) end
            end
        end)
        if found then return ("the output of %s is the first that is not finite"):format(found) end
    end
    for _, p in ipairs(params) do
        local g = p.tensor.grad
        if g and bad(g) then return ("the gradient of %s is not finite"):format(p.name) end
    end
    return "its layer could not be found"
end

function Run:not_finite(what, index)
    local text = ("%s: %s at update %d (row %s): %s. Training stops; %s"):format(self.name, what, self.step + 1,
        tostring(index or self.current_batch and self.current_batch.index or "?"), culprit(self),
        self.saved and ("the checkpoint of update %d in %s is intact"):format(self.saved, self.folder) or "nothing was saved")
    self.closed = true
    self.progress:close()
    bridge.raise("ENONFINITE", nil, text)
end

-- ---- the loop -----------------------------------------------------------------------------------------------------
-- A value of the micro-step of row `index` into the sums.
local function count(self, k, v, index)
    if type(v) ~= "number" then lc.fail("run:log: %s must be a number, got a %s", tostring(k), type(v)) end
    if v ~= v or v == math.huge or v == -math.huge then self:not_finite(("%s is %s"):format(k, tostring(v)), index) end
    local s = self.sums[k]
    s.sum, s.n = s.sum + v, s.n + 1
end

--- Values of this micro-step, as numbers or tensors of one element; each is averaged over the micro-steps of an update. A
--- tensor on a device is copied there and looked at when the update comes, so that nothing waits for it before.
function Run:log(values)
    local keys = {}
    for k in pairs(values) do keys[#keys + 1] = k end
    table.sort(keys)
    for _, k in ipairs(keys) do
        local v, index = values[k], self.current_batch and self.current_batch.index
        if not self.sums[k] then
            self.sums[k] = { sum = 0, n = 0 }
            self.first_key = self.first_key or k
        end
        if lc.is_tensor(v) and v.device ~= "cpu" and v:numel() == 1 then
            local copy = lc.keep(lc.no_grad(lc.scope, function() return v:detach():reshape(1):to("f32"):clone() end))
            table.insert(self.unread, { key = k, index = index, value = copy })
        else
            if lc.is_tensor(v) then v = v:item() end
            count(self, k, v, index)
        end
    end
end

-- Reads what lies on the device.
local function read_values(self)
    local list = self.unread
    self.unread = {}
    for _, x in ipairs(list) do
        local v = x.value:item()
        x.value:drop()
        count(self, x.key, v, x.index)
    end
end

--- Backward of loss / accumulate, and the loss into the log.
function Run:backward(loss)
    if not lc.is_tensor(loss) or loss:numel() ~= 1 then lc.fail("run:backward: a loss of one element is needed") end
    local v = loss:item()
    self:log { loss = v }
    if self.accumulate > 1 then loss = loss * (1 / self.accumulate) end
    loss:backward()
    return v
end

--- Loss and backward of a model's next tokens in one, as steps that a device may record; the loss into the log.
function Run:learn(model, ids, labels)
    local loss = model:learn(ids, labels, 1 / self.accumulate, false)
    self:log { loss = loss }
    return loss
end

function Run:row_list(k)
    local epoch = math.floor(k / self.per_epoch) + 1
    if self.order.epoch ~= epoch then
        local list = self.opts.order
        if not list then
            list = self.data.order and self.data:order(epoch, self.seed) or require("lolcats.data").order(self.data.rows, epoch, self.seed)
        end
        self.order = { epoch = epoch, list = list }
    end
    local first, rows = (k % self.per_epoch) * self.batch, {}
    for i = 1, self.batch do rows[i] = self.order.list[first + i] end
    return rows, epoch
end

local function next_batch(self)
    if self.level then self:end_micro() end
    if self.eval_due then self:evaluate() end
    if self.step >= self.updates or self.finished then
        self:finish()
        return nil
    end
    self.level = scope.enter()
    local k = self.step * self.accumulate + self.micro
    local batch
    if self.data then
        local rows, epoch = self:row_list(k)
        batch = self.data:batch(rows)
        self.epoch = epoch
        if self.opts.drop_leftover and self.micro > 0 and k % self.per_epoch == 0 then self.optim:zero_grad() end
    else
        batch = {}
    end
    batch.step, batch.micro = self.step + 1, self.micro + 1
    self.current_batch = batch
    self.micro_tokens = batch.ids and lc.is_tensor(batch.ids) and batch.ids:numel() or 0
    self.clock = lc.now()
    return batch
end

--- The loop: for batch in run:steps() do ... end. batch.ids and batch.labels are [rows, seq]; what the body makes is dropped at
--- its end.
function Run:steps()
    return next_batch, self
end

function Run:end_micro()
    scope.leave(self.level)
    self.level = nil
    self.optim:round_gradients()
    self.micro = self.micro + 1
    self.tokens_now = (self.tokens_now or 0) + self.micro_tokens
    if self.micro == self.accumulate then self:update() end
    self:tick()
    if self.micro == 0 then self:after_update() end
end

-- Time since the batch was handed out, into the sums.
function Run:tick()
    local now = lc.now()
    local spent = now - self.clock
    self.clock, self.seconds, self.session_seconds = now, self.seconds + spent, self.session_seconds + spent
end

local function means(self)
    read_values(self)
    local out = {}
    for k, s in pairs(self.sums) do out[k] = s.sum / s.n end
    return out
end

function Run:update()
    local row = means(self)
    local norm = self.optim:grad_norm()
    if norm ~= norm or norm == math.huge then self:not_finite("the gradient is not finite") end
    if self.opts.clip then self.optim:clip(self.opts.clip, norm) end
    local lr = self.schedule:rate(self.step)
    self.updating = true
    self.optim:step(lr)
    self.optim:zero_grad()
    self.step, self.micro = self.step + 1, 0
    self.tokens, self.session_tokens = self.tokens + self.tokens_now, self.session_tokens + self.tokens_now
    self.tokens_now, self.sums = 0, {}
    self.lr, self.shown = lr, row
    self:tick()
    local line = { step = self.step, lr = lr, grad_norm = norm, seconds = math.floor(self.seconds * 1e3 + 0.5) / 1e3 }
    for k, v in pairs(row) do line[k] = v end
    self.metrics:add(line)
    self.eval_due = self.opts.eval ~= nil and (self.step % self.eval_every == 0 or self.step == self.updates)
    self:mark()
    self.updating = false
end

--- Tokens a second of this process, without evaluation and saving.
function Run:rate() return self.session_seconds > 0 and self.session_tokens > 0 and self.session_tokens / self.session_seconds or nil end

function Run:show()
    local done = self.step - (self.resumed or 0)
    local left = done > 0 and (self.updates - self.step) * self.session_seconds / done or nil
    local metrics = {}
    if self.shown and self.first_key then metrics[1] = { self.first_key, self.shown[self.first_key] } end
    if self.best and self.last_eval then metrics[2] = { "eval", self.last_eval } end
    self.progress:update { done = self.step, total = self.updates, epoch = self.epoch, epochs = self.epochs, metrics = metrics, lr = self.lr,
                           rate = self:rate(), memory = lc.peak_rss(), left = left }
end

function Run:after_update()
    collectgarbage("step", 200)
    self:show()
    if self.eval_due then self:evaluate() end
    local due = self.step % self.save_every == 0 or lc.now() - self.last_save > self.save_seconds
    if due and self.saved ~= self.step then self:save() end
end

-- ---- evaluation ---------------------------------------------------------------------------------------------------
local function metric_of(self, result)
    if type(result) == "number" then return { [self.metric] = result }, result end
    if type(result) ~= "table" then lc.fail("%s: eval must return a number or a table of numbers, it returned a %s", self.name, type(result)) end
    local v, names, out = result[self.metric], {}, {}
    for k, x in pairs(result) do
        if type(x) == "number" then names[#names + 1], out[k] = tostring(k), x end
    end
    table.sort(names)
    if type(v) ~= "number" then
        lc.fail("%s: eval returned no '%s' (metric =), it returned %s", self.name, self.metric, table.concat(names, ", "))
    end
    return out, v
end

function Run:evaluate()
    local values, v = metric_of(self, lc.no_grad(lc.scope, self.opts.eval, self))
    if v ~= v or v == math.huge or v == -math.huge then self:not_finite(("%s of the evaluation is %s"):format(self.metric, tostring(v))) end
    local better = not self.best or (self.mode == "min" and v < self.best.value) or (self.mode == "max" and v > self.best.value)
    if better then
        folder.save_best(self.folder, self.optim, { step = self.step, metric = self.metric, value = v, version = folder.VERSION })
        self.best = { value = v, step = self.step }
    end
    self.updating = true
    self.schedule:observe(v)
    for k, x in pairs(values) do
        if x ~= x or x == math.huge or x == -math.huge then values[k] = nil end
    end
    self.metrics:add { step = self.step, eval = values }
    self.eval_due, self.last_eval, self.last_values = false, v, values
    self:mark()
    self.updating = false
    if not self.progress.live then
        local parts = {}
        for k, x in pairs(values) do parts[#parts + 1] = k .. " " .. log.number(x) end
        table.sort(parts)
        if not self.opts.quiet then log.say("%s  %d/%d  held out: %s", self.name, self.step, self.updates, table.concat(parts, ", ")) end
    end
    self:save()
end

-- ---- the end ------------------------------------------------------------------------------------------------------
-- Most tensor memory in use on the device that is trained on, in MB; nil for the CPU, where the process's peak says it.
local function device_peak(self)
    local device = self.optim.params[1].tensor.device
    return device ~= "cpu" and lc.memory("peak", device) / 2 ^ 20 or nil
end

function Run:summary()
    local last = {}
    for k, v in pairs(self.shown or {}) do last[k] = v end
    return {
        name = self.name, updates = self.step, seconds = self.seconds, tokens = self.tokens,
        tok_s = self.seconds > 0 and self.tokens > 0 and self.tokens / self.seconds or nil, last = next(last) and last or nil,
        best = self.best, held_out = self.last_values, lr = self.lr, peak_rss_mb = lc.peak_rss() / 2 ^ 20,
        peak_device_mb = device_peak(self), parameters = self.optim.flat.n, resumed_at = self.resumed,
    }
end

--- Curves of the run so far: losses.svg, and with terminal = true also as text on stderr.
function Run:plot(terminal)
    local plot = require "lolcats.plot"
    local series = plot.read_metrics(self.folder .. "/metrics.jsonl")
    if #series == 0 then return end
    files.write(self.folder .. "/losses.svg", plot.svg(series, { title = self.name, xlabel = "update", ylabel = self.first_key or "loss" }))
    if terminal then
        log.say("%s", plot.terminal(series, { title = self.name, width = log.width(2), color = log.has_color(2), height = 10 }))
    end
end

--- Ends the run: last checkpoint, plots, summary; the best parameters come back. The loop calls it by itself; a loop left with
--- `break` may.
function Run:finish()
    if self.closed then return end
    if self.level then
        scope.leave(self.level)
        self.level = nil
    end
    self.closed = true
    self.progress:close()
    if self.finished then return end
    self.finished = self.step >= self.updates
    self:mark()
    self:save()
    self:plot(not self.opts.quiet)
    files.write_json(self.folder .. "/summary.json", self:summary())
    if self.finished then self:take_best() end
end

-- ---- values measured once -----------------------------------------------------------------------------------------
local Results = {}
Results.__index = Results

--- A recipe's measured values in out/results.json: results:once(name, f) is f()'s value, computed only when it is not there yet.
--- A folder of another recipe or of other arguments is refused before anything is measured; fresh forgets the values.
function M.results(out)
    folder.open_out(out, fresh_wanted {})
    local self = setmetatable({ path = out .. "/results.json", request = folder.request("all"), values = {} }, Results)
    if files.exists(self.path) then
        local have = files.read_json(self.path)
        folder.compare(out, have.request, files.parse_json(files.to_json(self.request), "request"))
        self.values = have.values
    end
    return self
end

function Results:once(name, f)
    if self.values[name] == nil then
        self.values[name] = files.parse_json(files.to_json { f() }, name)[1] -- as a resumed run will read it
        files.write_json(self.path, { request = self.request, values = self.values })
    end
    return self.values[name]
end

--- Stops the run that Ctrl-C struck; what main.lua tells the user.
function M.interrupted()
    local run = M.current
    return run and run:interrupted() or nil
end

M.Run = Run
return M
