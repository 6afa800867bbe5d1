-- finetune.lua: the second stage alone: low-rank adapters on a linearized student (or any model), next-token loss.
--   lolcats finetune --student runs/distill/student --data FILE.json
local lc = require "lolcats"
local files, eval, log = lc.files, lc.eval, require "lolcats.log"

local function finetune(d)
    local args = lc.args {
        d.doc or "Train LoRA on a linearized student or a model with the next-token loss.",
        { "student", d.student or lc.required, "a saved student, or a model" },
        { "base", d.base or "", "the model that the student was made from, where it has moved" },
        { "data", d.data or lc.required, "file with records or text, or a data set by name" },
        { "out", d.out or "runs/finetune", "folder for checkpoints and logs" },
        { "seq", d.seq or 1024, "tokens a training row", min = 2 },
        { "records", d.records or 0, "records of the data to read; 0: all", min = 0 },
        { "hold_out", d.hold_out or 0.05, "records held out: a number, or a share below 1" },
        { "eval_rows", d.eval_rows or 16, "held-out rows for evaluation", min = 1 },
        { "steps", d.steps or 0, "updates; 0: by epochs", min = 0 },
        { "epochs", d.epochs or 2, "passes over the data" },
        { "accumulate", d.accumulate or 8, "rows an update", min = 1 },
        { "optim", d.optim or "adamw", "optimizer", { "adamw", "adam", "sgd", "adafactor" } },
        { "lr", d.lr or 1e-4, "learning rate" }, { "weight_decay", d.weight_decay or 0, "weight decay", min = 0 },
        { "schedule", d.schedule or "plateau", "learning rate over time",
          { "plateau", "cosine", "linear", "constant" } },
        { "clip", d.clip or 1, "largest gradient norm; 0: no clipping", min = 0 },
        { "rank", d.rank or 8, "rank of LoRA, where the student has none yet", min = 1 },
        { "alpha", d.alpha or 16, "scale of LoRA is alpha / rank" },
        { "targets", d.targets or { "q_proj", "k_proj", "v_proj", "o_proj" }, "projections that LoRA adapts" },
        { "recompute", d.recompute or false, "gradient checkpointing: less memory, more time" },
        { "train_maps", d.train_maps or false, "train maps and window factors too" },
        { "eval_every", d.eval_every or 100, "updates between evaluations", min = 1 },
        { "dtype", d.dtype or "f32", "dtype of the frozen weights", { "f32", "bf16", "f16", "f64" } },
        { "device", d.device or "cpu", "where to compute: cpu, cuda:0" },
        { "seed", d.seed or 0, "order of rows and start of LoRA" },
        { "fresh", false, "start over instead of going on" },
        d.more or {},
    }
    if d.prepare then d.prepare(args) end
    lc.manual_seed(args.seed)
    local student = lc.load(args.student,
                            { base = args.base ~= "" and args.base or nil, dtype = args.dtype, device = args.device })
    if student.use_linear then
        student:use_linear { keep_training = args.train_maps and { "." } or nil }
    else
        student:freeze()
    end
    student:recompute_layers(args.recompute)
    if not student.lora then student:add_lora { rank = args.rank, alpha = args.alpha, targets = args.targets } end
    local data = lc.data(args.data, { model = student, seq = args.seq, hold_out = args.hold_out,
                                      limit = args.records > 0 and args.records or nil })
    log.say("%s\n%s", tostring(student), tostring(data))
    if not data.held then lc.fail("hold_out is 0: there is nothing to measure perplexity on") end
    local held, results = data.held:list(args.eval_rows), lc.train.results(args.out)
    local before = results:once("before_ppl", function() return eval.perplexity_rows(student, held).ppl end)
    local run = lc.run {
        name = "lora", out = args.out, data = data, params = student:trainable(), model = student,
        optim = lc.optim.named(args.optim, { lr = args.lr, weight_decay = args.weight_decay }),
        schedule = args.schedule, clip = args.clip > 0 and args.clip or nil,
        max_steps = args.steps > 0 and args.steps or nil, epochs = args.steps == 0 and args.epochs or nil,
        accumulate = args.accumulate, seed = args.seed, fresh = args.fresh, eval_every = args.eval_every,
        eval = function()
            local r = eval.perplexity_rows(student, held)
            return { loss = r.loss, ppl = r.ppl }
        end,
    }
    for batch in run:steps() do run:backward((student:loss(batch.ids, batch.labels))) end
    local after = results:once("after_ppl", function() return eval.perplexity_rows(student, held).ppl end)
    local folder = args.out .. (student.is_student and "/student" or "/adapter") -- or an adapter, as PEFT writes it
    if student.is_student then student:save(folder) else student:save_adapter(folder) end
    print(log.table({ { "before", ("%.2f"):format(before) }, { "after", ("%.2f"):format(after) } },
                    { "", "perplexity" }))
    print(("\nPerplexity on %d held-out rows of %d tokens of %s. It is in %s: lolcats chat --model %s")
        :format(#held, args.seq, args.data, folder, folder))
    files.write_json(args.out .. "/summary.json",
                     { student = args.student, before_ppl = before, lora_ppl = after, steps = run:summary().updates })
end

if ... == "recipe" then return finetune end
finetune {}
