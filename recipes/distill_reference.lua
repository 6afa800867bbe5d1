-- distill_reference.lua: the reference's own command line: linearize by its configurations, flags, names and paths.
--   lolcats distill --model_config distill_llama3_1_8b_lk_smd_wtk64_fd64_w01 \
--     --distill_config distill_alpaca_clean_xent0_mse1000_lr1e-2 --finetune_config finetune_lora_qkvo_alpaca_clean
local lc = require "lolcats"
local configs, files, log = lc.configs, lc.files, require "lolcats.log"
local flags_of, request, names = require "lolcats.reference_flags", require "lolcats.reference_request",
    require "lolcats.run_name"
local stage, trainers, datasets, checkpoint = require "lolcats.train.stage", require "lolcats.train.trainers",
    require "lolcats.data.reference", require "lolcats.reference_checkpoint"

local PROMPT = [[

Summarize this dialog:
Tom: Did the parcel come?
Ida: Yes, at noon. It is far bigger than I thought.
Tom: That is the desk. Can you leave it in the hall?
Ida: It blocks the door, so Max and I carried it to the shed.
---
Summary:]]

local function distill(d)
    local rows = {
        d.doc or "Linearize a model by the reference's configurations: attention transfer, LoRA, evaluation.",
        { "data", d.data or "", "file with the records, instead of the data set that the experiments name" },
        { "config_dir", d.config_dir or "configs", "folder with model/ and experiment/ of your own; looked in first" },
        { "compat", d.compat or "none", "do as the reference does where it is wrong, and say so; terrace, rope, window, " ..
          "flow: the model alone, in this one thing", { "none", "reference", "terrace", "rope", "window", "flow" } },
        { "device", d.device or "cpu", "where to compute: cpu, cuda:0" },
        { "dtype", d.dtype or "", "of the frozen weights; without it the configuration's",
          { "", "f32", "bf16", "f16", "f64" } },
        { "clip", d.clip or 0, "largest gradient norm; 0: as the experiment says", min = 0 },
        { "format", d.format or "pt", "of checkpoints: the reference's .pt, or folders of our own",
          { "pt", "folder" } },
        { "inputs", d.inputs or "disk", "with layers_per_model: where a block's inputs come from",
          { "disk", "memory", "recompute" } },
        { "student", d.student or "", "folder that the student is written to in the end, for chat, eval and so on" },
        { "fresh", false, "start over instead of going on" },
        unpack(flags_of.rows()),
    }
    for _, row in ipairs(d.more or {}) do rows[#rows + 1] = row end
    for _, row in ipairs(rows) do
        if type(row) == "table" and d[row[1]] ~= nil then row[2] = d[row[1]] end
    end
    local args = lc.args(rows)
    if d.prepare then d.prepare(args) end
    if args.device:match "^%d+$" then args.device = "cuda:" .. args.device end -- as the scripts for blocks have it
    local wish = request.read(args)
    local paths, options, compat = wish.paths, wish.options, wish.compat
    lc.manual_seed(args.seed)
    local function load_data(tree, name, model)
        return datasets.load(tree.dataset, {
            model = model, source = args.data ~= "" and args.data or nil, data_dir = args.data_dir,
            hold_out = d.hold_out or (name:match "^llama3_1_" and 500 or 200),
        })
    end
    local clip = args.clip > 0 and args.clip or nil

    -- The model and its student.
    local blocks -- what the first stage learned block by block, before the whole model is in memory
    if args.layers_per_model and wish.trains_first then
        local top = lc.load(wish.path, { dtype = wish.dtype, part = { first = 1, last = 0 } })
        blocks = stage.in_blocks { tree = wish.first, model = wish.path, out = wish.folder(paths.distill),
                                   data = load_data(wish.first, args.distill_config, top), student = options,
                                   layers = args.layers_per_model, inputs = args.inputs,
                                   hidden = args.attentions_data_dir, dtype = wish.dtype, device = args.device,
                                   seed = args.seed, clip = clip, fresh = args.fresh }
    end
    local teacher = wish.load()
    log.say("%s\n%s", tostring(teacher), paths.names.finetune)
    local student = options and lc.linearize(teacher, options) or teacher
    if args.print_model then print(student) end
    local function sample(what)
        if args.no_init_eval or not student.tokenizer then return end
        for i = 1, args.num_generations do
            local t0 = lc.now()
            local text, ids = student:generate(PROMPT,
                                               { max_new = args.max_new_tokens, temperature = i > 1 and 1 or 0,
                                                 top_k = args.top_k,
                                                         top_p = args.top_p, seed = args.seed + i })
            print(("\n> %s: %s"):format(what, (text:gsub("%s+", " "))))
            if args.benchmark then print(("%d tokens in %.2f s"):format(#ids, lc.now() - t0)) end
        end
    end
    local report = {}

    -- 1. Attention transfer.
    if wish.first_lora then student:add_lora(wish.first_lora) end
    if args.load_distill_checkpoint then
        checkpoint.load_all(student, args.load_distill_checkpoint == "default" and paths.distill or
                            args.load_distill_checkpoint)
    end
    local function save_maps(file, values, step)
        checkpoint.save(student, file, { step = step, ["distill/eval/loss"] = values.loss }, args.format,
                        wish.first_lora and "trained" or "maps")
    end
    if blocks then
        checkpoint.load(student, blocks.folder)
        save_maps(paths.distill, blocks, blocks.step)
        for _, b in ipairs(args.format == "pt" and blocks.blocks or {}) do -- as the scripts for blocks name them
            local file = names.block(args.checkpoint_dir .. "/" .. paths.names.distill, b.first - 1, b.last - 1,
                                     #student.layers)
            checkpoint.save(student, file, { step = b.step, ["distill/eval/loss"] = b.loss }, "pt", "maps", b)
        end
    elseif wish.trains_first then
        local s = stage.train {
            name = "distill", out = wish.folder(paths.distill), tree = wish.first, student = student,
            params = student:trainable(), data = load_data(wish.first, args.distill_config, teacher),
            seed = args.seed, clip = clip, compat = compat, rounded = wish.rounded, fresh = args.fresh,
            chunk = wish.chunk,
            save = function(step, values) save_maps(names.periodic(paths.distill, step), values, step) end,
        }
        report.distill, report.distill_steps = s.best and s.best.value, s.updates
        save_maps(paths.distill, { loss = s.best and s.best.value or s.held_out.loss },
                  s.best and s.best.step or s.updates)
    elseif not args.load_distill_checkpoint then
        log.say "no distillation"
    end
    if wish.first_lora then student:merge_first_lora() end
    if options then sample "linearized" end

    -- 2. Low-rank repair.
    local second = wish.second
    if second or args.load_finetune_checkpoint then
        local lora, train
        if second then
            lora, train = configs.lora_options(second)
        else
            lora = checkpoint.lora_of(args.load_finetune_checkpoint, args.config_dir)
        end
        if options then student:use_linear { keep_training = train } end
        student:recompute_layers(args.fsdp_activation_checkpointing == true)
        if lora then student:add_lora(lora) end
        if args.load_finetune_checkpoint then checkpoint.load(student, args.load_finetune_checkpoint) end
    end
    if second and second.trainer.name and (not args.load_finetune_checkpoint or args.resume_finetune) then
        local function save(file, values, step)
            checkpoint.save(student, file, { step = step, ["eval/loss"] = values.loss }, args.format, "trained")
        end
        local s = stage.train {
            name = "ft", out = wish.folder(paths.finetune), tree = second, student = student,
            params = student:trainable(), data = load_data(second, wish.second_name, teacher), seed = args.seed,
            clip = clip, compat = compat, rounded = wish.rounded,
            csv = paths.csv and checkpoint.fits(paths.csv), fresh = args.fresh, chunk = wish.chunk,
            save = function(step, values) save(names.periodic(paths.finetune, step), values, step) end,
        }
        report.finetune, report.finetune_steps = s.best and s.best.value, s.updates
        save(paths.finetune, { loss = s.best and s.best.value or s.held_out.loss }, s.best and s.best.step or s.updates)
        if args.format == "pt" and options and student.lora and (args.enable_fsdp or blocks) then
            checkpoint.save_combined(student, names.combined(paths.names, blocks and {
                final = wish.second_name, no_distill = args.no_distill, step = s.best and s.best.step or s.updates }))
        end
        sample "fine-tuned"
    end

    -- 3. Answers scored by ROUGE.
    if args.eval_config then
        local tree = configs.load("experiment", args.eval_config, args.config_dir)
        local data = load_data(tree, args.eval_config, teacher)
        if trainers.find(tree.trainer.name).stage ~= "evaluation" then
            lc.fail("%s is no evaluation", args.eval_config)
        end
        if not data.test then lc.fail("the data set %s has no prompts to answer", tree.dataset.name) end
        report.rouge = trainers.score_answers(student, data.test, { max_new = d.max_new, limit = d.answers })
        print(files.to_json({ ["final/eval"] = report.rouge }, { indent = 2 }))
    end
    if args.student ~= "" then
        if not student.save then lc.fail("--student: the model keeps its softmax attention; there is no student") end
        student:save(args.student)
    end
    if wish.trains_first then print("--attn_mlp_checkpoint_path " .. checkpoint.fits(paths.distill)) end
    if second then print("--finetune_checkpoint_path " .. checkpoint.fits(paths.finetune)) end
    if d.finish then d.finish(args, report) end
    return student, report
end

if ... == "recipe" then return distill end
distill {}
