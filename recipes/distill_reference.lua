-- distill_reference.lua: the reference's own command line: linearize by its configurations, flags, names and paths.
--   lolcats distill --model_config distill_llama3_1_8b_lk_smd_wtk64_fd64_w01 \
--     --distill_config distill_alpaca_clean_xent0_mse1000_lr1e-2 --finetune_config finetune_lora_qkvo_alpaca_clean --lk_zero_init
local lc = require "lolcats"
local configs, files, log = lc.configs, lc.files, require "lolcats.log"
local flags_of, names, stage = require "lolcats.reference_flags", require "lolcats.run_name", require "lolcats.train.stage"
local trainers, datasets, checkpoint = require "lolcats.train.trainers", require "lolcats.data.reference", require "lolcats.reference_checkpoint"

local PROMPT = "\nSummarize this dialog:\nTom: Did the parcel come?\nIda: Yes, at noon. It is far bigger than I thought.\nTom: That is the desk. " ..
               "Can you leave it in the hall?\nIda: It blocks the door, so Max and I carried it to the shed.\n---\nSummary:"

local function distill(d)
    local rows = {
        d.doc or "Linearize a model by the reference's configurations: attention transfer, LoRA, evaluation.",
        { "data", d.data or "", "file with the records, instead of the data set that the experiments name" },
        { "config_dir", d.config_dir or "configs", "folder with model/ and experiment/ of your own; looked in first" },
        { "compat", d.compat or "none", "do as the reference does where it is wrong, and say so", { "none", "reference" } },
        { "device", d.device or "cpu", "where to compute: cpu, cuda:0" },
        { "dtype", d.dtype or "", "of the frozen weights; without it the configuration's", { "", "f32", "bf16", "f16", "f64" } },
        { "clip", d.clip or 0, "largest gradient norm; 0: as the experiment says", min = 0 },
        { "format", d.format or "pt", "of checkpoints: the reference's .pt, or folders of our own", { "pt", "folder" } },
        { "fresh", false, "start over instead of going on" },
        unpack(flags_of.rows()),
    }
    for _, row in ipairs(d.more or {}) do rows[#rows + 1] = row end
    for _, row in ipairs(rows) do
        if type(row) == "table" and d[row[1]] ~= nil then row[2] = d[row[1]] end
    end
    local args = lc.args(rows)
    if d.prepare then d.prepare(args) end
    local flags, compat = flags_of.check(args), args.compat == "reference"
    lc.manual_seed(args.seed)

    -- What is asked for: three files, with the flags over them.
    local model_tree = configs.override_model(configs.load("model", args.model_config, args.config_dir), flags)
    local first = args.distill_config and configs.override_experiment(configs.load("experiment", args.distill_config, args.config_dir), flags)
    for k, v in pairs(model_tree.optimizer or {}) do
        if first then first.optimizer[k] = v end
    end
    local loads_first = args.load_distill_checkpoint and not args.resume_distill
    local trains_first = first and first.trainer.name and not loads_first and not args.no_distill
    local paths = names.paths(flags, trains_first and first.trainer or nil, { fsdp = args.enable_fsdp })
    local second
    if args.finetune_config then
        local over = flags
        if flags.max_finetune_steps then over = setmetatable({ max_steps = flags.max_finetune_steps }, { __index = flags }) end
        second = configs.override_experiment(configs.load("experiment", args.finetune_config, args.config_dir), over, true)
        second.dataloader.batch_size = second.trainer.batch_size or 1
        if args.finetune_lr then second.optimizer.lr = args.finetune_lr end
        if compat and trains_first then
            stage.quirk "the first stage's trainer settings stand over the second's"
            for _, k in ipairs { "gradient_accumulation_steps", "num_train_epochs", "max_steps", "eval_steps", "max_eval_batches" } do
                if not (k == "max_steps" and flags.max_finetune_steps) then second.trainer[k] = first.trainer[k] end
            end
        end
    end
    if args.verbose then print(files.to_json({ model = model_tree, distill = first, finetune = second }, { indent = 2 })) end

    -- The model and its student.
    local dtype = args.dtype ~= "" and args.dtype or model_tree.model.torch_dtype
    local teacher = lc.load(model_tree.model.pretrained_model_name_or_path, { dtype = dtype, device = args.device }):freeze()
    log.say("%s\n%s", tostring(teacher), paths.names.finetune)
    local options = configs.linearize_options(model_tree)
    if options and compat then options.compat = "reference" end
    local student = options and lc.linearize(teacher, options) or teacher
    if args.print_model then print(student) end
    local function folder(path) return checkpoint.fits((path:gsub("_%a+%.pt$", "") .. ".run")) end -- of lc.run's own files
    local chunk = model_tree.attention.state_chunk_len
    local function load_data(tree, name)
        return datasets.load(tree.dataset, { model = teacher, source = args.data ~= "" and args.data or nil, data_dir = args.data_dir,
                                             hold_out = d.hold_out or (name:match "^llama3_1_" and 500 or 200) })
    end
    local function sample(what)
        if args.no_init_eval or not student.tokenizer then return end
        print(("\n> %s: %s"):format(what, (student:generate(PROMPT, { max_new = args.max_new_tokens, temperature = 0 }):gsub("%s+", " "))))
    end
    local report = {}

    -- 1. Attention transfer.
    if args.load_distill_checkpoint then
        checkpoint.load(student, args.load_distill_checkpoint == "default" and paths.distill or args.load_distill_checkpoint)
    end
    if trains_first then
        local function save(path, values, step) checkpoint.save(student, path, { step = step, ["distill/eval/loss"] = values.loss }, args.format, "maps") end
        local s = stage.train {
            name = "distill", out = folder(paths.distill), tree = first, student = student, params = student:trainable(), data = load_data(first, args.distill_config),
            seed = args.seed, clip = args.clip > 0 and args.clip or nil, compat = compat, fresh = args.fresh, chunk = chunk,
            save = function(step, values) save(names.periodic(paths.distill, step), values, step) end,
        }
        report.distill, report.distill_steps = s.best and s.best.value, s.updates
        save(paths.distill, { loss = s.best and s.best.value or s.held_out.loss }, s.best and s.best.step or s.updates)
    elseif not args.load_distill_checkpoint then
        log.say "no distillation"
    end
    if options then sample "linearized" end

    -- 2. Low-rank repair.
    if second or args.load_finetune_checkpoint then
        local lora, train = configs.lora_options(second or { finetune = { method = "lora" } })
        if options then student:use_linear { keep_training = train } end
        if lora then student:add_lora(lora) end
        if args.load_finetune_checkpoint then checkpoint.load(student, args.load_finetune_checkpoint) end
    end
    if second and second.trainer.name and (not args.load_finetune_checkpoint or args.resume_finetune) then
        local function save(path, values, step) checkpoint.save(student, path, { step = step, ["eval/loss"] = values.loss }, args.format, "trained") end
        local s = stage.train {
            name = "ft", out = folder(paths.finetune), tree = second, student = student, params = student:trainable(), data = load_data(second, args.finetune_config),
            seed = args.seed, clip = args.clip > 0 and args.clip or nil, compat = compat, csv = checkpoint.fits(paths.csv), fresh = args.fresh,
            chunk = chunk, save = function(step, values) save(names.periodic(paths.finetune, step), values, step) end,
        }
        report.finetune, report.finetune_steps = s.best and s.best.value, s.updates
        save(paths.finetune, { loss = s.best and s.best.value or s.held_out.loss }, s.best and s.best.step or s.updates)
        sample "fine-tuned"
    end

    -- 3. Answers scored by ROUGE.
    if args.eval_config then
        local tree = configs.load("experiment", args.eval_config, args.config_dir)
        local data = load_data(tree, args.eval_config)
        if trainers.find(tree.trainer.name).stage ~= "evaluation" then lc.fail("%s is no evaluation", args.eval_config) end
        if not data.test then lc.fail("the data set %s has no prompts to answer", tree.dataset.name) end
        report.rouge = trainers.score_answers(student, data.test, { max_new = d.max_new, limit = d.answers })
        print(files.to_json({ ["final/eval"] = report.rouge }, { indent = 2 }))
    end
    if trains_first then print("--attn_mlp_checkpoint_path " .. checkpoint.fits(paths.distill)) end
    if second then print("--finetune_checkpoint_path " .. checkpoint.fits(paths.finetune)) end
    if d.finish then d.finish(args, report) end
    return student, report
end

if ... == "recipe" then return distill end
distill {}
