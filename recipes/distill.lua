-- distill.lua: linearize a softmax model: attention transfer, then LoRA, with perplexities before and after.
--   lolcats distill --model DIR --data FILE.json
--   lolcats distill --model_config NAME --distill_config NAME --finetune_config NAME    as the reference: see distill_reference
-- The whole method stands in the two loops below. distill_smollm2 and distill_mistral are this recipe with other
-- defaults.
local lc = require "lolcats"
local files, eval, log = lc.files, lc.eval, require "lolcats.log"

local function numbers(list)
    local out = {}
    for i, v in ipairs(list) do out[i] = tonumber(v) or lc.fail("'%s' is no position of a layer", v) end
    return out
end

local function distill(d) -- d: defaults of the arguments
    local args = lc.args {
        d.doc or "Linearize a softmax-attention model: attention transfer, then LoRA. (With --model_config it takes the " ..
            "reference's command line instead: lolcats distill_reference --help.)",
        { "model", d.model or lc.required, "folder, GGUF file, Hub id in the local cache, or smollm2" },
        { "data", d.data or lc.required, ".json, .jsonl or .txt file, or chitchat (fetched once from PyPI)" },
        { "out", d.out or "runs/distill", "folder for checkpoints, logs and plots" },
        { "map", d.map or "hedgehog", "feature map: a built-in name, or a .lua file" },
        { "feature_dim", d.feature_dim or 0, "learned features a head; 0: the map's own" },
        { "window", d.window or 64, "tokens that keep softmax attention" },
        { "kind", d.kind or "terrace", "how the window moves", { "terrace", "sliding", "linear" } },
        { "seq", d.seq or 1024, "tokens a training row", min = 2 },
        { "records", d.records or 0, "records of the data to read; 0: all", min = 0 },
        { "hold_out", d.hold_out or 0.05, "records held out: a number, or a share below 1" },
        { "eval_rows", d.eval_rows or 16, "held-out rows that the table's perplexities are measured on", min = 1 },
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
        { "bias", d.bias or false, "feature maps with a bias" },
        -- beyond the reference
        { "sinks", d.sinks or 0, "first tokens that every query keeps in its window", min = 0 },
        { "affine", d.affine or false, "weights g and 1 - g of window and linear part, not g and 1; with --window_factor 4 " ..
          "it starts as the window alone" },
        { "window_factor", d.window_factor or -2.1972245773362196, "where g starts, before its sigmoid" },
        { "fade", d.fade or 0, "the linear part starts at 1/500 of its weight; without transfer it comes in over this share of the updates",
          min = 0, max = 1 },
        { "softmax_layers", d.softmax_layers or {}, "layers that keep softmax: positions from 1, negative from the end" },
        { "keep_search", d.keep_search or 0, "after transfer, so many layers get their softmax back: the costliest, as measured",
          min = 0 },
        { "kl", d.kl or 0, "share of the second stage's loss that is the divergence from the teacher's distribution",
          min = 0, max = 1 },
        { "window_drop", d.window_drop or 0, "while training, how often a layer is purely linear: its linear part gets used",
          min = 0, max = 1 },
        { "window_drop_from", d.window_drop_from or 0, "share of each stage that passes before that begins", min = 0, max = 1 },
        { "fresh", false, "start over instead of going on" },
        unpack(d.more or {}),
    }
    if d.prepare then d.prepare(args) end
    lc.manual_seed(args.seed)

    local teacher = lc.load(args.model, { dtype = args.dtype, device = args.device }):freeze()
    log.say("%s", tostring(teacher))
    local data = lc.data(args.data, { model = teacher, seq = args.seq, hold_out = args.hold_out,
                                      limit = args.records > 0 and args.records or nil })
    log.say("%s", tostring(data))
    if not data.held then lc.fail("hold_out is 0: there is nothing to measure perplexity on") end
    local student = lc.linearize(teacher,
                                 { map = args.map, window = args.window, kind = args.window > 0 and args.kind or
                                   "linear",
                                            feature_dim = args.feature_dim > 0 and args.feature_dim or nil,
                                                bias = args.bias or nil,
                                            sinks = args.sinks > 0 and args.sinks or nil,
                                            affine = args.affine or nil, window_factor = args.window_factor,
                                            softmax_layers = #args.softmax_layers > 0 and numbers(args.softmax_layers) or nil })

    -- Measured values go to results.json at once, so that a run that is resumed does not measure twice.
    local results = lc.train.results(args.out)
    local held = data.held:list(args.eval_rows)
    local watched = data.held:list(math.min(4, args.eval_rows)) -- looked at while training
    local function perplexity(name, how)
        return results:once(name, function()
            log.say("measuring the perplexity: %s", (name:gsub("_ppl$", ""):gsub("_", " ")))
            if how == "window" then return student:window_only(eval.perplexity_rows, student, held).ppl end
            return eval.perplexity_rows(how == "teacher" and teacher or student, held).ppl
        end)
    end
    -- A sample continues enough text that keys have left the window: within it a student is still its teacher. Where
    -- the row is a chat, it begins an answer.
    local ids, labels = held[1].ids:totable()[1], held[1].labels:totable()[1]
    local cut = math.min(args.seq - 1, math.max(4 * args.window, 64))
    for i = cut, 2, -1 do
        if i > cut / 2 and labels[i] ~= -100 and labels[i - 1] == -100 then
            cut = i - 1
            break
        end
    end
    local context = { unpack(ids, 1, cut) }
    local function sample(name, model)
        if args.sample == 0 or not model.tokenizer then return "" end
        return results:once(name, function()
            local how = { max_new = args.sample, temperature = 0.7, top_p = 0.9, repetition = 1.1, seed = args.seed }
            if args.prompt == "" then return (model:generate(context, how)) end
            if model.chat_template then return (lc.chat(model, how):say(args.prompt)) end
            return (model:generate(args.prompt, how))
        end)
    end
    local function optimizer(lr) return lc.optim.named(args.optim, { lr = lr, weight_decay = args.weight_decay }) end
    local function steps_or_epochs(n) return n > 0 and n or nil, n == 0 and args.epochs or nil end

    -- Swapped in as it starts, the linear part wrecks the model. The first stage trains it whole all the same, since each
    -- layer learns by itself from true hidden states; without that stage it comes in while the second trains it.
    local function fade(run)
        local n = args.window > 0 and args.fade * (run and run.updates or 1) or 0
        local done = run and run.step or 0
        student:fade(done < n and 500 ^ (done / n - 1) or 1)
    end

    perplexity("teacher_ppl", "teacher")
    sample("teacher_sample", teacher)
    fade()
    perplexity("swapped_ppl")
    if args.window > 0 then perplexity("swapped_window_ppl", "window") end
    sample("swapped_sample", student)

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
            optim = optimizer(args.transfer_lr), schedule = args.schedule, clip = args.clip > 0 and args.clip or
                nil,
            max_steps = max_steps, epochs = epochs, accumulate = args.accumulate, seed = args.seed, fresh = args.fresh,
            eval_every = args.eval_every, metric = "mse", eval = function()
                local mse = 0
                for _, row in ipairs(watched) do
                    mse = mse + student:transfer(row.ids, { backward = false }) / #watched
                end
                return { mse = mse }
            end,
        }
        for batch in run:steps() do
            drop_windows(run)
            local loss = student:transfer(batch.ids, { scale = 1 / run.accumulate })
            run:log { mse = loss * run.accumulate }
        end
        local summary = results:once("transfer", function() return run:summary() end)
        perplexity("transfer_ppl")
        if args.window > 0 then perplexity("transfer_window_ppl", "window") end
        sample("transfer_sample", student)
        return summary
    end
    if args.transfer then student:fade(1) end
    local transfer = args.transfer and transfer_stage() or {}

    student:draw_windows(0)
    if args.keep_search > 0 then
        student:keep_softmax(results:once("kept_layers", function()
            log.say "measuring what each layer costs"
            local list = {}
            for i, r in ipairs(lc.no_grad(student.rank_layers, student, watched)) do
                if i <= args.keep_search then list[i] = r.layer end
            end
            return list
        end))
    end

    -- 2. Low-rank repair: plain next-token loss through the linear attentions.
    student:use_linear({ keep_training = args.train_maps and { "." } or nil }):add_lora { rank = args.rank,
            alpha = args.alpha, targets = args.targets }
    local max_steps, epochs = steps_or_epochs(args.lora_steps)
    local run = lc.run {
        name = "lora", out = args.out, data = data, params = student:trainable(), model = student,
        optim = optimizer(args.lora_lr), schedule = args.schedule, clip = args.clip > 0 and args.clip or nil,
        max_steps = max_steps, epochs = epochs, accumulate = args.accumulate, seed = args.seed, fresh = args.fresh,
        eval_every = args.eval_every, eval = function()
            student:fade(1)
            local r = eval.perplexity_rows(student, watched)
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
    local lora = results:once("lora", function() return run:summary() end)
    student:draw_windows(0):fade(1)
    perplexity("lora_ppl")
    if args.window > 0 then perplexity("window_only_ppl", "window") end
    sample("lora_sample", student)
    student:save(args.out .. "/student")

    -- What came of it.
    local r = results.values
    local function ppl(v) return v and ("%.2f"):format(v) or "-" end
    local function stage(name, s, window, whole, memory)
        return { name, ppl(whole), ppl(window), s and ("%.0f"):format(s.tok_s or 0) or "-",
                 memory and ("%.0f MB"):format(memory) or "-" }
    end
    print(log.table({
        stage("teacher (softmax)", nil, nil, r.teacher_ppl),
        stage("swapped, untrained", nil, r.swapped_window_ppl, r.swapped_ppl),
        args.transfer and stage("attention transfer", transfer, r.transfer_window_ppl, r.transfer_ppl,
                                transfer.peak_device_mb or transfer.peak_rss_mb) or stage "no attention transfer",
        stage("LoRA", lora, r.window_only_ppl, r.lora_ppl, lora.peak_device_mb or lora.peak_rss_mb),
    }, { "", "perplexity", "window only", "tokens/s", "peak memory" }))
    print(("\nPerplexity on %d held-out rows of %d tokens of %s. Window only: the linear part switched off."):format(#held, args.seq, args.data))
    if args.sample > 0 then
        local prompt = args.prompt
        if prompt == "" then
            prompt = "..." .. teacher.tokenizer:decode({ unpack(context, math.max(1, #context - 39)) },
                                                       { skip_special = true })
        end
        print(("\n> %s"):format((prompt:gsub("%s+", " "))))
        for _, row in ipairs { { "teacher", r.teacher_sample }, { "swapped", r.swapped_sample },
                               { "transfer", r.transfer_sample },
                               { "LoRA", r.lora_sample } } do
            print(("  %-9s %s"):format(row[1], (tostring(row[2]):gsub("[%s%c]+", " "))))
        end
    end
    files.write_json(args.out .. "/summary.json", {
        model = args.model, data = args.data, map = args.map, window = args.window, seq = args.seq,
        held_out_rows = #held,
        teacher_ppl = r.teacher_ppl, swapped_ppl = r.swapped_ppl, transfer_ppl = r.transfer_ppl, lora_ppl = r.lora_ppl,
        window_only_ppl = r.window_only_ppl, swapped_window_ppl = r.swapped_window_ppl,
        transfer_window_ppl = r.transfer_window_ppl,
        transfer_tok_s = transfer.tok_s, lora_tok_s = lora.tok_s, transfer_steps = transfer.updates,
        lora_steps = lora.updates,
        transfer_seconds = transfer.seconds, lora_seconds = lora.seconds,
        peak_rss_mb = math.max(transfer.peak_rss_mb or 0, lora.peak_rss_mb),
        transfer_peak_rss_mb = transfer.peak_rss_mb,
        device = args.device, transfer_peak_device_mb = transfer.peak_device_mb,
        lora_peak_device_mb = lora.peak_device_mb,
        samples = { teacher = r.teacher_sample, swapped = r.swapped_sample, transfer = r.transfer_sample,
                    lora = r.lora_sample },
    })
    if d.finish then d.finish(args, r) end
    return student
end

if ... == "recipe" then return distill end
if require("lolcats.reference_flags").wanted(arg) then return lc.recipe "distill_reference" {} end
distill {}
