-- stage.lua: one stage of training as an experiment configuration describes it: its trainer, optimizer, schedule,
-- length, evaluation, results file and checkpoints, on a student and its data. What the reference gets wrong is right
-- here; with compat its way is taken and said.
local lc = require "lolcats"
local files = require "lolcats.files"
local configs = require "lolcats.configs"
local trainers = require "lolcats.train.trainers"
local names = require "lolcats.run_name"
local log = require "lolcats.log"

local M = {}

-- ---- the results file: a row an evaluation, as pandas writes it -----------------------------------------------------
local HEAD = ",eval_step,eval/loss,eval/ppl,eval/seq_len\n"

--- Puts the row of an evaluation into a results file and drops rows of later updates, which a resumed run will measure
--- again.
function M.add_result(path, step, values)
    local rows = {}
    if files.is_file(path) then
        for line in files.read(path):gmatch "[^\n]+" do
            local _, at, rest = line:match "^(%d+),(%d+)(,.*)$"
            if at and tonumber(at) < step then rows[#rows + 1] = ("%d,%s%s"):format(#rows, at, rest) end
        end
    end
    local function show(v) return v and names.python_float(v) or "" end
    rows[#rows + 1] = ("%d,%d,%s,%s,%s"):format(#rows, step, show(values.loss), show(values.ppl), show(values.seq_len))
    files.make_dirs(files.dirname(path))
    files.write(path, HEAD .. table.concat(rows, "\n") .. "\n")
end

-- ---- quirks ---------------------------------------------------------------------------------------------------------
local SAID = {}
local function quirk(text)
    if SAID[text] then return end
    SAID[text] = true
    log.say("compat: %s", text)
end

-- Rows that evaluation looks at.
local function eval_rows(rows, trainer, compat)
    local n = trainer.max_eval_batches
    if not n or n < 0 then return rows:list() end
    if compat then
        quirk "evaluation looks at one batch more than max_eval_batches"
        n = n + 1
    end
    return rows:list(n)
end

-- Flags that change nothing in training.
local NEUTRAL = { "no_init_eval", "max_new_tokens", "top_k", "top_p", "num_generations", "verbose", "print_model",
                  "benchmark", "no_wandb", "wandb_entity", "project_name", "huggingface_token", "eval_config", "format",
                  "results_dir", "load_distill_checkpoint", "resume_distill" }

-- What the maps hold when a second stage begins: wherever they came from, a resumed run must begin with the same.
local function maps_digest(student)
    local parts = {}
    for _, p in ipairs(student.map_params and student:map_params() or {}) do
        local x = p.tensor:detach():contiguous()
        parts[#parts + 1] = files.sha256(x.device == "cpu" and x or x:to { device = "cpu" })
    end
    return files.sha256(table.concat(parts))
end

-- The gradient norm that a stage clips at: o.clip, or what the experiment says for many GPUs; nil: none.
local function clip_of(o)
    local fsdp = o.tree.fsdp
    local clip = o.clip or (fsdp and fsdp.gradient_clipping and (fsdp.gradient_clipping_threshold or 1)) or 0
    return clip > 0 and clip or nil
end

-- ---- the stage ------------------------------------------------------------------------------------------------------
--- Trains. o: name ("distill" or "ft"), out (folder of lc.run's files), tree (the experiment), student, params, data
--- ({train =, validation =}), seed, batch, clip, compat, rounded (training state to bfloat16's digits), csv (path),
--- fresh, chunk, save(step, values): called at every num_save_ckpt_steps updates with an evaluation. Returns lc.run's
--- summary.
function M.train(o)
    local trainer, t = trainers.find(o.tree.trainer.name), o.tree.trainer
    local length = configs.length(o.tree)
    local rows = eval_rows(o.data.validation, t, o.compat)
    local how = { mse_factor = t.mse_factor, xent_factor = t.xent_factor, chunk = o.chunk, reference = o.compat }
    if t.name == "distill_attention_mse_linear" then how.xent_factor = 0 end
    if o.compat and trainer.stage == "language" and not trainer.layerwise then
        quirk "eval/loss and eval/ppl are means over chunks of each chunk's own"
    end
    local clip = clip_of(o)
    local every = t.num_save_ckpt_steps or 1000
    local leftover = o.data.train.rows % length.accumulate ~= 0
    if o.compat and leftover and not length.max_steps then
        quirk "gradients of micro-batches that are left over at an epoch's end are dropped"
    end
    if t.evaluation_strategy == "epoch" then
        length.eval_every = math.max(1, math.floor(o.data.train.rows / length.accumulate))
    end
    local optimizer = configs.optimizer(o.tree, o.rounded)
    if optimizer.rounded then
        quirk(("parameters, gradients and moments have bfloat16's digits (AdamW, %s)"):format(optimizer.rounded))
    end
    local run
    run = lc.run {
        name = o.name, out = o.out, data = o.data.train, params = o.params, model = o.student,
        optim = optimizer,
        schedule = configs.schedule(o.tree), clip = clip, epochs = length.epochs,
        max_steps = length.max_steps,
        settings = trainer.stage == "language" and { maps = lc.no_grad(lc.scope, maps_digest, o.student) } or nil,
        accumulate = length.accumulate, batch = o.batch or o.tree.dataloader and o.tree.dataloader.batch_size or 1,
        seed = o.seed,
        eval_every = length.eval_every, metric = "loss", mode = t.greater_is_better and "max" or "min", fresh = o.fresh,
        drop_leftover = o.compat and leftover or nil, load_best = t.load_best_model_at_end ~= false, neutral = NEUTRAL,
        eval = function(self)
            local values = trainer.evaluate(o.student, rows, how)
            if o.csv then M.add_result(o.csv, self.step, values) end
            if o.save and self.step % every == 0 then o.save(self.step, values) end
            return values
        end,
    }
    for batch in run:steps() do trainer.step(o.student, batch, run, how) end
    return run:summary()
end

--- The first stage with the memory of one block of layers. o: tree, model (path), out, data ({train =, validation =}),
--- layers (a block), inputs, hidden (folder of these), student (options of lc.linearize), dtype, device, seed, clip,
--- fresh. Returns {folder = of the student, loss =, step =, blocks = {{first =, last =, loss =, step =}, ..}}, layers
--- from 1.
function M.in_blocks(o)
    local t, length, optimizer = o.tree.trainer, configs.length(o.tree), configs.optimizer(o.tree)
    local trainer = trainers.find(t.name)
    if trainer.stage ~= "transfer" or t.name:match "chunked" then
        lc.fail("blocks learn by attention transfer of whole rows; the trainer %s does otherwise", t.name)
    end
    local schedule = { name = o.tree.lr_scheduler and o.tree.lr_scheduler.lr_scheduler_type or "none" }
    for k, v in pairs(o.tree.lr_scheduler or {}) do
        if k ~= "lr_scheduler_type" then schedule[k] = v end
    end
    local xent = t.name ~= "distill_attention_mse_linear" and t.xent_factor or 0
    local watched = t.max_eval_batches -- they are held in memory, so all of them only where that is asked for
    if not watched or watched < 1 then watched = 32 end
    o.data.train.held = o.data.validation
    local run = lc.blockwise {
        model = o.model, out = o.out, data = o.data.train, layers = o.layers, student = o.student, lora = false,
        batch = o.tree.dataloader and o.tree.dataloader.batch_size or 1, accumulate = length.accumulate,
        transfer = { steps = length.max_steps, epochs = length.epochs, optim = optimizer.kind,
                     optim_options = optimizer.opts, lr = optimizer.lr, weight_decay = optimizer.opts.weight_decay,
                     schedule = schedule, clip = clip_of(o), mse = t.mse_factor, xent = xent,
                     eval_every = length.eval_every },
        inputs = o.inputs, hidden = o.hidden, eval_rows = watched, dtype = o.dtype, device = o.device, seed = o.seed,
        fresh = o.fresh,
    }
    local out = { folder = run:train(), loss = 0, step = 0, blocks = run.blocks }
    for b, block in ipairs(run.blocks) do
        local summary = ("%s/b%02d-transfer/summary.json"):format(o.out, b)
        if files.exists(summary) then
            local s = files.read_json(summary)
            block.loss, block.step = type(s.best) == "table" and s.best.value or 0, s.updates
            out.loss, out.step = out.loss + block.loss / #run.blocks, block.step
        end
    end
    return out
end

M.quirk = quirk
return M
