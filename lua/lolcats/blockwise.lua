-- blockwise.lua: lc.blockwise: linearizes a model in blocks of a few layers, with the memory of one block. Each block
-- is read from the model's files, taught on the true hidden states that reach it (attention transfer, then LoRA against
-- the block's own softmax output), written, and dropped; the next block's inputs come from disk, from memory, or are
-- computed again from the tokens. A killed run goes on at its block. In the end the blocks are stitched to one student.
-- With one layer a block and inputs on disk it is layer-major order: all rows through one layer before the next.
--
-- OUT/blockwise.json what was asked for; OUT/bNN-transfer, bNN-lora the runs; OUT/blocks/bNN.safetensors what block NN
-- learned; OUT/hidden/bNN the inputs of block NN; OUT/student the result, as student:save writes it.
local lc = require "lolcats"
local files = require "lolcats.files"
local linearize = require "lolcats.linearize"
local maps = require "lolcats.feature_map"
local streams = require "lolcats.blockwise.streams"
local log = require "lolcats.log"

local M = {}

local Blockwise = {}
Blockwise.__index = Blockwise

local KNOWN = {}
for word in ([[model out data layers student transfer lora inputs hidden dtype device seed shard keep_inputs quiet batch
               accumulate stop_after eval_rows fresh]]):gmatch "%S+" do
    KNOWN[word] = true
end

local function check(opts)
    for k in pairs(opts) do
        if not KNOWN[k] then
            local names = {}
            for name in pairs(KNOWN) do names[#names + 1] = name end
            table.sort(names)
            lc.fail("lc.blockwise has no option '%s'; it has %s", tostring(k), table.concat(names, ", "))
        end
    end
    for _, k in ipairs { "model", "out", "data" } do
        if not opts[k] then lc.fail("lc.blockwise needs %s", k) end
    end
    local n = opts.layers or 1
    if type(n) ~= "number" or n < 1 or n % 1 ~= 0 then
        lc.fail("layers: how many a block has, got %s", tostring(opts.layers))
    end
    if opts.inputs and not streams.KINDS[opts.inputs] then
        lc.fail("inputs: 'disk', 'memory' or 'recompute', not '%s'", tostring(opts.inputs))
    end
end

-- Frees a model's tensors now, not when the collector comes by.
function M.drop_model(model)
    local seen = {}
    for _, t in pairs(model.weights) do
        if not seen[t] then
            seen[t] = true
            t:drop()
        end
    end
    model.inv_freq:drop()
    model.weights, model.layers = {}, {}
    collectgarbage()
    collectgarbage()
end

--- A block-wise run. opts: model (folder, GGUF file or Hub id), out, data (rows of lc.data), layers (a block, 1),
--- student (options of lc.linearize), transfer and lora (tables: steps or epochs, optim (a name: adamw), optim_options,
--- lr, weight_decay, schedule (a name, or {name =, ...} as a configuration has it), clip, eval_every; transfer also
--- mse, xent; lora also rank, alpha, targets, dropout, objective "output" or "attention"; lora = false: no second
--- stage), inputs ("disk", "memory", "recompute"), hidden (folder of those on disk: OUT/hidden), shard (rows that are
--- moved through a block at a time, 16), keep_inputs, batch, accumulate, eval_rows (held-out rows looked at, 8), dtype,
--- device, seed. :train() does all that is left to do.
function M.new(opts)
    check(opts)
    local self = setmetatable({ opts = opts, out = opts.out, data = opts.data, seed = opts.seed or 0 }, Blockwise)
    self.whole = { dtype = opts.dtype, device = opts.device }
    local probe = self:part(1, 0)
    local n = probe.config.part.of
    self.config, self.source, self.n_layers, self.dtype = probe.config, probe.source, n, probe.dtype
    M.drop_model(probe)
    self.blocks = {}
    local size = opts.layers or 1
    for first = 1, n, size do
        self.blocks[#self.blocks + 1] = { first = first, last = math.min(n, first + size - 1) }
    end
    require("lolcats.train.folder").open_out(self.out, false) -- one process at a time
    files.make_dirs(self.out .. "/blocks")
    if opts.fresh then self:forget() end
    self:claim(self.out, self:request(), "start over with fresh, or take another folder")
    if opts.hidden then
        files.make_dirs(opts.hidden)
        self:claim(opts.hidden, self:inputs(), "take another folder for hidden states, or empty it")
    end
    self.streams = streams.new(self)
    return self
end

-- Notes in a folder what it is for; an error where it is for something else.
function Blockwise:claim(dir, request, advice)
    local path, wanted = dir .. "/blockwise.json", files.to_json(request)
    if not files.exists(path) then return files.write(path, wanted .. "\n") end
    for key, v in pairs(files.parse_json(wanted, "request")) do
        local have = files.read_json(path)[key]
        if files.to_json(have) ~= files.to_json(v) then
            lc.fail("%s holds another block-wise run (%s: %s there, %s here); %s", dir, key, files.to_json(have),
                    files.to_json(v), advice)
        end
    end
end

-- What hidden states depend on.
function Blockwise:inputs()
    local o = self.opts
    return { format = "lolcats-blockwise", version = 1, model = o.model, layers = o.layers or 1,
             dtype = o.dtype or "f32", eval_rows = o.eval_rows or 8,
             data = o.data.describe and o.data:describe() or o.data.rows }
end

function Blockwise:request()
    local o, out = self.opts, self:inputs()
    out.student, out.transfer, out.lora = o.student or {}, o.transfer or {}, o.lora == nil and {} or o.lora
    out.seed, out.batch, out.accumulate = self.seed, o.batch or 1, o.accumulate or 1
    return out
end

local OWN = { blocks = true, hidden = true, student = true, ["blockwise.json"] = true, ["results.json"] = true,
              ["summary.json"] = true }

-- Forgets what earlier runs left in the folder: their own files, nothing else that lies there.
function Blockwise:forget()
    local function clear(path)
        if not files.is_folder(path) then return files.remove(path) end
        for _, name in ipairs(files.list(path)) do clear(path .. "/" .. name) end
    end
    for _, name in ipairs(files.list(self.out)) do
        if OWN[name] or name:match "^b%d+%-transfer$" or name:match "^b%d+%-lora$" then clear(self.out .. "/" .. name) end
    end
    files.make_dirs(self.out .. "/blocks")
end

--- Layers first to last of the model, frozen; how: {embed =, head =}.
function Blockwise:part(first, last, how)
    local part = { first = first, last = last }
    for k, v in pairs(how or {}) do part[k] = v end
    return lc.load(self.opts.model, { dtype = self.whole.dtype, device = self.whole.device, part = part })
end

local function block_path(self, b) return ("%s/blocks/b%02d.safetensors"):format(self.out, b) end

--- Whether a block is done.
function Blockwise:done(b) return files.exists(block_path(self, b)) end

-- ---- one block ------------------------------------------------------------------------------------------------------
-- lc.linearize's options for a block, whose layers count from 1.
local function student_options(self, block)
    local out, kept = {}, {}
    for k, v in pairs(self.opts.student or {}) do out[k] = v end
    for _, i in ipairs(out.softmax_layers or {}) do
        local at = i < 0 and self.n_layers + 1 + i or i
        if at < 1 or at > self.n_layers then
            lc.fail("softmax_layers: there is no layer %d; the model has 1 to %d", i, self.n_layers)
        end
        if at >= block.first and at <= block.last then kept[#kept + 1] = at - block.first + 1 end
    end
    out.softmax_layers = #kept > 0 and kept or nil
    return out, #kept == block.last - block.first + 1
end

local function optimizer(how, lr)
    local opts = {}
    for k, v in pairs(how.optim_options or {}) do opts[k] = v end
    opts.lr, opts.weight_decay = how.lr or lr, how.weight_decay or 0
    return lc.optim.named(how.optim or "adamw", opts)
end

local function run_of(self, name, how, params, lr, data, evaluate)
    local schedule = how.schedule or "constant"
    if type(schedule) == "table" then schedule = lc.optim.named_schedule(schedule.name, schedule) end
    return lc.run {
        name = name, out = self.out, data = data, params = params, optim = optimizer(how, lr), schedule = schedule,
        clip = how.clip, max_steps = how.steps, epochs = not how.steps and (how.epochs or 1) or nil,
        batch = self.opts.batch or 1, accumulate = self.opts.accumulate or 1, eval = evaluate,
        eval_every = how.eval_every or 100, metric = "loss",
        load_best = how.load_best, seed = self.seed, quiet = self.opts.quiet, save_seconds = how.save_seconds,
        save_every = how.save_every, fresh = false,
    }
end

local function transfer(self, b, student, data, held)
    local how = self.opts.transfer or {}
    local function loss_of(x, more) return (student:transfer_hidden(x, more)) end
    local run = run_of(self, ("b%02d-transfer"):format(b), how, student:trainable(), 1e-2, data, function()
        local sum = 0
        for _, x in ipairs(held) do
            sum = sum + lc.scope(loss_of, x, { backward = false, mse = how.mse, xent = how.xent }) / #held
        end
        return sum
    end)
    for batch in run:steps() do
        local loss = loss_of(batch.hidden, { scale = 1 / run.accumulate, mse = how.mse, xent = how.xent })
        run:log { loss = loss * run.accumulate }
        if self.opts.stop_after and self.opts.stop_after(b, "transfer", run) then return nil end
    end
    return run:summary()
end

-- What a block of layers makes of x [b, t, H]; each layer's attention output goes to `seen`.
local function through(model, x, seen)
    local ctx = model:context(x)
    for _, layer in ipairs(model.layers) do
        local n = model:norm_in(layer, x)
        local q, k, v = model:qkv(layer, n, ctx)
        local y = model:attend(layer, q, k, v, n, ctx)
        if seen and layer.student ~= false then seen[#seen + 1] = y end
        x = model:finish(layer, x, y, ctx)
    end
    return x
end
M.through = through

-- LoRA's loss: what the block adds to the hidden states against what it adds with softmax attention, as a share; or the
-- attention outputs of each layer, as in the reference's block trainer.
local function lora_loss(student, teacher, x, how)
    local want, got = {}, {}
    local target = lc.no_grad(through, teacher, x, want)
    local y = through(student, x, got)
    if how.objective ~= "attention" then
        local scale = lc.no_grad(function() return lc.mse_loss(target, x):item() end)
        return lc.mse_loss(y, target) * (1 / math.max(scale, 1e-30))
    end
    local loss, n = nil, 0
    for i, layer in ipairs(student.layers) do
        if layer.student then
            local term = lc.mse_loss(got[i], want[i]) * (how.mse or 1000)
            loss, n = loss and loss + term or term, n + 1
        end
    end
    return loss * (1 / n)
end

local function repair(self, b, student, teacher, data, held)
    local how = self.opts.lora or {}
    if how.objective and how.objective ~= "output" and how.objective ~= "attention" then
        lc.fail("lora.objective: 'output' or 'attention', not '%s'", tostring(how.objective))
    end
    student:use_linear():add_lora { rank = how.rank, alpha = how.alpha, targets = how.targets, dropout = how.dropout }
    local run = run_of(self, ("b%02d-lora"):format(b), how, student:trainable(), 1e-4, data, function()
        local sum = 0
        for _, x in ipairs(held) do -- nothing is kept of a row
            sum = sum + lc.no_grad(lc.scope, function() return lora_loss(student, teacher, x, how):item() end) / #held
        end
        return sum
    end)
    for batch in run:steps() do
        run:backward(lora_loss(student, teacher, batch.hidden, how))
        if self.opts.stop_after and self.opts.stop_after(b, "lora", run) then return nil end
    end
    return run:summary()
end

local function write_block(self, b, tensors, about)
    about.first, about.last = self.blocks[b].first, self.blocks[b].last
    files.save_tensors(block_path(self, b), tensors, { format = "lolcats-block", about = files.to_json(about) })
end

-- Writes what a block learned, under its names in the whole model.
local function save_block(self, b, student, about)
    local tensors = {}
    for _, p in ipairs(student:trained()) do tensors[p.name] = p.tensor:detach() end
    local settings, adapters = student.settings, student.lora
    write_block(self, b, tensors, { linearize = settings, lora = adapters, summary = about })
    if student.map.custom and not files.exists(self.out .. "/blocks/feature_map.lua") then
        local text = maps.source_of(student.map)
        if text then files.write(self.out .. "/blocks/feature_map.lua", text) end
    end
end

-- Teaches block b; false when it was stopped.
local function train_block(self, b)
    local block = self.blocks[b]
    local teacher = self:part(block.first, block.last):freeze()
    local options, all_kept = student_options(self, block)
    local done, about = true, {}
    if all_kept then
        write_block(self, b, { kept = lc.zeros { 1 } }, { kept = true })
    else
        lc.manual_seed(self.seed * 1000 + b) -- a block that is begun again begins the same
        local student = linearize.linearize(teacher, options)
        local held = self.streams:held(b)
        local data = self.streams:rows(b, teacher)
        about.transfer = transfer(self, b, student, data, held)
        done = about.transfer ~= nil
        if done and self.opts.lora ~= false then
            lc.manual_seed(self.seed * 1000 + 500 + b)
            about.lora = repair(self, b, student, teacher, data, held)
            done = about.lora ~= nil
        end
        if done then save_block(self, b, student, about) end
        lc.train.current = nil
        M.drop_student(student)
    end
    if done then self.streams:advance(b, teacher) end
    M.drop_model(teacher)
    return done
end

--- Frees what a student has beside its teacher's weights.
function M.drop_student(student)
    for _, p in ipairs(student:trained()) do p.tensor:drop() end
    student.inv_freq:drop()
    student.layers, student.weights, student.teacher = {}, {}, nil
end

-- ---- all of it ------------------------------------------------------------------------------------------------------
--- Teaches every block that is not done yet, then stitches them. Returns the folder of the student.
function Blockwise:train()
    for b = 1, #self.blocks do
        if not self:done(b) then
            if not self.opts.quiet then
                log.say("block %d of %d: layers %d to %d", b, #self.blocks, self.blocks[b].first, self.blocks[b].last)
            end
            self.streams:prepare(b)
            if not lc.scope(train_block, self, b) then return nil end
        end
    end
    return self:stitch()
end

local function read_block(self, b)
    local f = files.open_tensors(block_path(self, b))
    return f, files.parse_json(f:meta "about", "about")
end

--- Joins what the blocks learned to one saved student. Returns its folder.
function Blockwise:stitch()
    local dir = self.out .. "/student"
    local tensors, settings, adapters = {}, nil, nil
    files.make_dirs(dir)
    lc.scope(function()
        for b = 1, #self.blocks do
            if not self:done(b) then
                lc.fail("%s: block %d is not done yet; its run goes on with :train()", self.out, b)
            end
            local f, about = read_block(self, b)
            if not about.kept then
                for _, name in ipairs(f:names()) do tensors[name] = f:tensor(name) end
                settings, adapters = about.linearize, about.lora or adapters
            end
            f:close()
        end
        if not settings then lc.fail("every layer keeps its softmax attention; there is no student") end
        settings.softmax_layers = self.opts.student and self.opts.student.softmax_layers or nil
        if adapters == files.null then adapters = nil end
        if adapters then adapters.layers = nil end
        local about = { format = linearize.FORMAT, version = linearize.VERSION, base = self.opts.model,
                        linearize = settings, lora = adapters,
                        shape = { layers = self.n_layers, hidden_size = self.config.hidden_size } }
        local code = self.out .. "/blocks/feature_map.lua"
        if files.exists(code) then
            about.custom_map = { name = settings.map, source = "feature_map.lua" }
            files.write(dir .. "/feature_map.lua", files.read(code))
        end
        files.save_tensors(dir .. "/student.safetensors", tensors, { format = linearize.FORMAT })
        files.write_json(dir .. "/student.json", about)
    end)
    return dir
end

-- The student of one finished block.
local function finished_block(self, b)
    local block = self.blocks[b]
    local teacher = self:part(block.first, block.last):freeze()
    local f, about = read_block(self, b)
    if about.kept then
        f:close()
        return teacher, teacher
    end
    lc.manual_seed(self.seed * 1000 + b)
    local student = linearize.linearize(teacher, (student_options(self, block)))
    if about.lora and about.lora ~= files.null then
        student:use_linear():add_lora { rank = about.lora.rank, alpha = about.lora.alpha, targets = about.lora.targets }
    end
    lc.no_grad(lc.scope, function()
        for _, p in ipairs(student:trained()) do p.tensor:detach():copy_(f:tensor(p.name)) end
    end)
    f:close()
    return student, teacher
end

-- Flat rows (from 0) that have a label, and the labels: position i predicts labels[i + 1].
local function labelled(labels)
    local rows, wanted = {}, {}
    for i, list in ipairs(labels:totable()) do
        for j = 2, #list do
            if list[j] ~= -100 then rows[#rows + 1], wanted[#wanted + 1] = (i - 1) * #list + j - 2, list[j] end
        end
    end
    return rows, wanted
end

--- Perplexity of the stitched student (or, with {teacher = true}, of the model) over rows {ids =, labels =}, one block
--- in memory at a time: {ppl =, loss =, tokens =}.
function Blockwise:perplexity(rows, opts)
    local top = self:part(1, 0, { embed = true })
    local hidden = lc.no_grad(function()
        local out = {}
        for i, r in ipairs(rows) do out[i] = lc.keep(streams.embed(top, r.ids)) end
        return out
    end)
    M.drop_model(top)
    for b = 1, #self.blocks do
        local student, teacher
        if opts and opts.teacher then
            teacher = self:part(self.blocks[b].first, self.blocks[b].last):freeze()
        else
            student, teacher = finished_block(self, b)
        end
        lc.no_grad(function()
            for i, x in ipairs(hidden) do
                hidden[i] = lc.keep(lc.scope(through, student or teacher, x))
                x:drop()
            end
        end)
        if student and student ~= teacher then M.drop_student(student) end
        M.drop_model(teacher)
    end
    local head = self:part(self.n_layers + 1, self.n_layers, { head = true })
    local total, count = 0, 0
    lc.no_grad(function()
        for i, r in ipairs(rows) do
            local sum, n = lc.scope(function()
                local x = lc.rms_norm(hidden[i], head.norm, head.config.rms_norm_eps)
                local where, wanted = labelled(r.labels or r.ids)
                local loss = head:loss_at(x, where, wanted)
                return loss:item() * #where, #where
            end)
            total, count = total + sum, count + n
        end
    end)
    M.drop_model(head)
    return { ppl = math.exp(total / count), loss = total / count, tokens = count }
end

M.Blockwise = Blockwise
return M
