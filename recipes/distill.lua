-- distill.lua: linearize a softmax model: attention transfer, then LoRA, with perplexities before and after.
--   lolcats distill --model DIR --data FILE.json
--   lolcats distill --model_config NAME --distill_config NAME ..   as the reference: see distill_reference
-- The whole method stands in the two loops below. distill_smollm2 and distill_mistral are this recipe with other
-- defaults.
local lc = require "lolcats"
local recipe, report = require "lolcats.recipe", require "lolcats.report"
local eval, log = lc.eval, require "lolcats.log"

local function distill(d) -- d: defaults of the arguments
    local args = lc.args {
        d.doc or "Linearize a softmax-attention model: attention transfer, then LoRA. (With --model_config it takes " ..
            "the reference's command line instead: lolcats distill_reference --help.)",
        { "model", d.model or lc.required, "folder, GGUF file, Hub id in the local cache, or smollm2" },
        { "data", d.data or lc.required, ".json, .jsonl or .txt file, or chitchat (fetched once from PyPI)" },
        { "out", d.out or "runs/distill", "folder for checkpoints, logs and plots" },
        recipe.student_rows(d),
        { "seq", d.seq or 1024, "tokens a training row", min = 2 },
        { "records", d.records or 0, "records of the data to read; 0: all", min = 0 },
        { "hold_out", d.hold_out or 0.05, "records held out: a number, or a share below 1" },
        { "eval_rows", d.eval_rows or 16, "held-out rows that the table's perplexities are measured on", min = 1 },
        { "long_seq", d.long_seq or 0, "the result is measured on held-out rows of so many tokens too; 0: no",
          min = 0 },
        { "transfer_steps", d.transfer_steps or 0, "updates of the first stage; 0: by epochs", min = 0 },
        { "lora_steps", d.lora_steps or 0, "updates of the second stage; 0: by epochs", min = 0 },
        { "epochs", d.epochs or 2, "passes over the data a stage, when steps do not say" },
        { "accumulate", d.accumulate or 1, "rows an update", min = 1 },
        { "transfer_lr", d.transfer_lr or 1e-2, "learning rate of attention transfer" },
        { "lora_lr", d.lora_lr or 1e-4, "learning rate of LoRA" },
        { "optim", d.optim or "adamw", "optimizer of both stages", { "adamw", "adam", "sgd", "adafactor" } },
        { "weight_decay", d.weight_decay or 0, "weight decay of both stages", min = 0 },
        { "schedule", d.schedule or "plateau", "learning rate over time",
          { "plateau", "cosine", "linear", "constant" } },
        { "clip", d.clip or 0, "largest gradient norm; 0: no clipping", min = 0 },
        { "recompute", d.recompute or false, "gradient checkpointing in the second stage: less memory, more time" },
        { "rank", d.rank or 8, "rank of LoRA", min = 1 },
        { "alpha", d.alpha or 16, "scale of LoRA is alpha / rank" },
        { "targets", d.targets or { "q_proj", "k_proj", "v_proj", "o_proj" }, "projections that LoRA adapts" },
        { "eval_every", d.eval_every or 100, "updates between evaluations while training", min = 1 },
        { "dtype", d.dtype or "f32", "dtype of the frozen weights; on a GPU of the activations too",
          { "f32", "bf16", "f16", "f64" } },
        { "device", d.device or "cpu", "where to compute: cpu, cuda:0" },
        { "seed", d.seed or 0, "order of rows and start of LoRA" },
        { "prompt", d.prompt or "", "what the samples continue, or answer; without one, the start of a held-out row" },
        { "sample", d.sample or 40, "tokens a sample; 0: none", min = 0 },
        { "transfer", d.transfer ~= false, "first stage: maps learn to copy attention; --no-transfer leaves it out" },
        { "train_maps", d.train_maps or false, "the second stage trains maps and window factors too" },
        -- beyond the reference
        { "fade", d.fade or 0, "the linear part starts at 1/500 of its weight; without transfer it comes in over " ..
          "this share of the updates", min = 0, max = 1 },
        { "keep_search", d.keep_search or 0,
          "after transfer, so many layers get their softmax back: the costliest, as measured", min = 0 },
        { "kl", d.kl or 0, "share of the second stage's loss that is the divergence from the teacher's distribution",
          min = 0, max = 1 },
        { "window_drop", d.window_drop or 0,
          "while training, how often a layer is purely linear: its linear part gets used", min = 0, max = 1 },
        { "window_drop_from", d.window_drop_from or 0, "share of each stage that passes before that begins",
          min = 0, max = 1 },
        { "fresh", false, "start over instead of going on" },
        d.more or {},
    }
    if d.prepare then d.prepare(args) end
    lc.manual_seed(args.seed)

    local teacher = lc.load(args.model, { dtype = args.dtype, device = args.device }):freeze()
    log.say("%s", tostring(teacher))
    local function rows_of(seq)
        return lc.data(args.data, { model = teacher, seq = seq, hold_out = args.hold_out,
                                    limit = args.records > 0 and args.records or nil })
    end
    local data = rows_of(args.seq)
    log.say("%s", tostring(data))
    if args.keep_search >= #teacher.layers then
        lc.fail("--keep_search %d leaves none of %d layers to linearize", args.keep_search, #teacher.layers)
    end
    local student = lc.linearize(teacher, recipe.student(args))
    local long = args.long_seq > 1 and
        rows_of(args.long_seq).held:list(math.max(1, math.floor(args.eval_rows * args.seq / args.long_seq))) or nil
    local shown = report.new { args = args, teacher = teacher, student = student, data = data, long = long }
    local function optimizer(lr) return lc.optim.named(args.optim, { lr = lr, weight_decay = args.weight_decay }) end
    local function steps_or_epochs(n) return n > 0 and n or nil, n == 0 and args.epochs or nil end

    -- Swapped in as it starts, the linear part wrecks the model. The first stage trains it whole all the same, since
    -- each layer learns by itself from true hidden states; without that stage it comes in while the second trains it.
    local function fade(run)
        local n = args.window > 0 and args.fade * (run and run.updates or 1) or 0
        local done = run and run.step or 0
        student:fade(done < n and 500 ^ (done / n - 1) or 1)
    end

    shown:measure "teacher"
    fade()
    shown:measure "swapped"

    local function drop_windows(run)
        if args.window_drop > 0 and run.step >= args.window_drop_from * run.updates then
            student:draw_windows(args.window_drop)
        end
    end

    -- 1. Attention transfer: each layer learns to copy the softmax attention it replaces. Backward runs inside, layer
    -- by layer.
    local function transfer_stage()
        local max_steps, epochs = steps_or_epochs(args.transfer_steps)
        local run = lc.run {
            name = "transfer", out = args.out, data = data, params = student:trainable(), model = student,
            optim = optimizer(args.transfer_lr), schedule = args.schedule, clip = args.clip > 0 and args.clip or nil,
            max_steps = max_steps, epochs = epochs, accumulate = args.accumulate, seed = args.seed, fresh = args.fresh,
            eval_every = args.eval_every, metric = "mse", eval = function()
                local mse = 0
                for _, row in ipairs(shown.watched) do
                    mse = mse + student:transfer(row.ids, { backward = false }) / #shown.watched
                end
                return { mse = mse }
            end,
        }
        for batch in run:steps() do
            drop_windows(run)
            local loss = student:transfer(batch.ids, { scale = 1 / run.accumulate, wait = false })
            run:log { mse = loss * run.accumulate }
        end
        shown:measure("transfer", run)
    end
    if args.transfer then
        student:fade(1)
        transfer_stage()
    end

    student:draw_windows(0)
    if args.keep_search > 0 then
        student:keep_softmax(shown:once("kept_layers", function()
            log.say "measuring what each layer costs"
            local list = {}
            for i, r in ipairs(lc.no_grad(student.rank_layers, student, shown.watched)) do
                if i <= args.keep_search then list[i] = r.layer end
            end
            return list
        end))
    end

    -- 2. Low-rank repair: plain next-token loss through the linear attentions.
    student:use_linear({ keep_training = args.train_maps and { "." } or nil }):recompute_layers(args.recompute)
    student:add_lora { rank = args.rank, alpha = args.alpha, targets = args.targets }
    local max_steps, epochs = steps_or_epochs(args.lora_steps)
    local run = lc.run {
        name = "lora", out = args.out, data = data, params = student:trainable(), model = student,
        optim = optimizer(args.lora_lr), schedule = args.schedule, clip = args.clip > 0 and args.clip or nil,
        max_steps = max_steps, epochs = epochs, accumulate = args.accumulate, seed = args.seed, fresh = args.fresh,
        eval_every = args.eval_every, eval = function()
            student:fade(1)
            local r = eval.perplexity_rows(student, shown.watched)
            return { loss = r.loss, ppl = r.ppl }
        end,
    }
    for batch in run:steps() do
        drop_windows(run)
        if not args.transfer then fade(run) end
        if args.kl > 0 then
            run:backward((student:distill_loss(batch.ids, batch.labels, { ce = 1 - args.kl, kl = args.kl })))
        else
            run:learn(student, batch.ids, batch.labels)
        end
    end
    student:draw_windows(0):fade(1)
    shown:measure("lora", run)
    student:save(args.out .. "/student")
    shown:print()
    shown:write()
    if d.finish then d.finish(args, shown.results.values) end
    return student
end

if ... == "recipe" then return distill end
if require("lolcats.reference_flags").wanted(arg) then return lc.recipe "distill_reference" {} end
distill {}
