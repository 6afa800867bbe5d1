-- distill_blocks.lua: linearize a model that does not fit in memory: block by block, each with the memory of a few
-- layers. Every block learns on the true hidden states that reach it; a killed run goes on at its block.
--   lolcats distill_blocks --model DIR --data FILE.json --layers 5
-- distill_llama3_1_70b and distill_llama3_1_405b are this recipe with other defaults.
local lc = require "lolcats"
local recipe, files, log = require "lolcats.recipe", lc.files, require "lolcats.log"

local function distill(d)
    local args = lc.args {
        d.doc or "Linearize a large model in blocks of layers: attention transfer, then LoRA, a block at a time.",
        { "model", d.model or lc.required, "folder, GGUF file or Hub id" },
        { "data", d.data or lc.required, "file with records or text, or a data set by name" },
        { "out", d.out or "runs/blocks", "folder for blocks, logs and the student" },
        { "layers", d.layers or 1, "layers a block", min = 1 },
        { "inputs", d.inputs or "disk", "where a block's inputs come from", { "disk", "memory", "recompute" } },
        recipe.student_rows(d),
        { "seq", d.seq or 1024, "tokens a training row", min = 2 },
        { "records", d.records or 0, "records of the data to read; 0: all", min = 0 },
        { "hold_out", d.hold_out or 0.05, "records held out: a number, or a share below 1" },
        { "eval_rows", d.eval_rows or 8, "held-out rows for evaluation", min = 1 },
        { "transfer_steps", d.transfer_steps or 0, "updates of attention transfer a block; 0: by epochs", min = 0 },
        { "lora_steps", d.lora_steps or 0, "updates of LoRA a block; 0: by epochs", min = 0 },
        { "lora", d.lora ~= false, "second stage: LoRA on each block; --no-lora leaves it to finetune" },
        { "objective", d.objective or "output", "what a block's LoRA is to match: what the block puts out, or the " ..
          "output of each attention", { "output", "attention" } },
        { "epochs", d.epochs or 1, "passes over the data a stage, when steps do not say" },
        { "accumulate", d.accumulate or 8, "rows an update", min = 1 },
        { "mse", d.mse or 1000, "factor of the outputs' squared error" },
        { "xent", d.xent or 0, "factor of the weights' cross entropy" },
        { "transfer_lr", d.transfer_lr or 1e-2, "learning rate of attention transfer" },
        { "lora_lr", d.lora_lr or 1e-4, "learning rate of LoRA" },
        { "optim", d.optim or "adamw", "optimizer of both stages", { "adamw", "adam", "sgd", "adafactor" } },
        { "weight_decay", d.weight_decay or 0, "weight decay of both stages", min = 0 },
        { "schedule", d.schedule or "plateau", "learning rate over time",
          { "plateau", "cosine", "linear", "constant" } },
        { "clip", d.clip or 1, "largest gradient norm; 0: no clipping", min = 0 },
        { "rank", d.rank or 8, "rank of LoRA", min = 1 },
        { "alpha", d.alpha or 16, "scale of LoRA is alpha / rank" },
        { "targets", d.targets or { "q_proj", "k_proj", "v_proj", "o_proj" }, "projections that LoRA adapts" },
        { "eval_every", d.eval_every or 100, "updates between evaluations while training", min = 1 },
        { "dtype", d.dtype or "bf16", "dtype of the frozen weights", { "f32", "bf16", "f16", "f64" } },
        { "device", d.device or "cpu", "where to compute: cpu, cuda:0" },
        { "seed", d.seed or 0, "order of rows and start of LoRA" },
        { "fresh", false, "start over instead of going on" },
        d.more or {},
    }
    if d.prepare then d.prepare(args) end
    lc.manual_seed(args.seed)
    local top = lc.load(args.model, { dtype = args.dtype, part = { first = 1, last = 0 } }) -- its words, no layers
    local data = lc.data(args.data, { model = top, seq = args.seq, hold_out = args.hold_out,
                                      limit = args.records > 0 and args.records or nil })
    log.say("%s", tostring(data))
    if not data.held then lc.fail("hold_out is 0: there is nothing to measure perplexity on") end
    local function stage(lr, steps, more)
        local how = { optim = args.optim, weight_decay = args.weight_decay, lr = lr, schedule = args.schedule,
                      clip = args.clip > 0 and args.clip or nil, eval_every = args.eval_every,
                      steps = steps > 0 and steps or nil, epochs = steps == 0 and args.epochs or nil }
        for k, v in pairs(more) do how[k] = v end
        return how
    end
    local run = lc.blockwise {
        model = args.model, out = args.out, data = data, layers = args.layers, inputs = args.inputs,
        student = recipe.student(args),
        transfer = stage(args.transfer_lr, args.transfer_steps, { mse = args.mse, xent = args.xent }),
        lora = args.lora and stage(args.lora_lr, args.lora_steps,
                                   { rank = args.rank, alpha = args.alpha, targets = args.targets,
                                     objective = args.objective }),
        accumulate = args.accumulate, eval_rows = args.eval_rows, dtype = args.dtype, device = args.device,
        seed = args.seed, fresh = args.fresh,
    }
    local student = run:train()
    local results = lc.train.results(args.out)
    local rows = data.held:list(args.eval_rows)
    local teacher_ppl = results:once("teacher_ppl", function() return run:perplexity(rows, { teacher = true }).ppl end)
    local student_ppl = results:once("student_ppl", function() return run:perplexity(rows).ppl end)
    print(log.table({ { "teacher (softmax)", ("%.2f"):format(teacher_ppl) },
                      { "linearized in blocks of " .. args.layers, ("%.2f"):format(student_ppl) } },
                    { "", "perplexity" }))
    local peak = lc.peak_rss() / 2 ^ 20
    print(("\n%s; peak memory %.0f MB; next: lolcats finetune --student %s --data %s --seq %d --hold_out %g --dtype %s")
        :format(student, peak, student, args.data, args.seq, args.hold_out, args.dtype))
    files.write_json(args.out .. "/summary.json", { model = args.model, layers = args.layers, teacher_ppl = teacher_ppl,
                                                    lora_ppl = student_ppl, peak_rss_mb = peak })
end

if ... == "recipe" then return distill end
distill {}
