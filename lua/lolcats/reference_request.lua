-- reference_request.lua: what a command line of the reference's asks for: its configurations with the flags laid over
-- them, which stages run, and under which names and paths their files stand.
local lc = require "lolcats"
local configs = require "lolcats.configs"
local cli = require "lolcats.cli"
local files = require "lolcats.files"
local flags_of = require "lolcats.reference_flags"
local log = require "lolcats.log"
local names = require "lolcats.run_name"

local M = {}

-- The second stage's experiment: its own file, with the flags that hold for both stages.
local function second_of(args, flags, name)
    local over = flags
    if flags.max_finetune_steps then
        over = setmetatable({ max_steps = flags.max_finetune_steps }, { __index = flags })
    end
    local tree = configs.override_experiment(configs.load("experiment", name, args.config_dir), over, true)
    tree.dataloader = tree.dataloader or {}
    tree.dataloader.batch_size = tree.trainer.batch_size or 1
    if args.finetune_lr then tree.optimizer.lr = args.finetune_lr end
    return tree
end

-- The first stage's trainer settings over the second's, as in the reference when both run in one process.
local function let_first_stand(first, second, flags)
    require("lolcats.train.stage").quirk "the first stage's trainer settings stand over the second's"
    for _, k in ipairs { "gradient_accumulation_steps", "num_train_epochs", "max_steps", "eval_steps",
                         "max_eval_batches" } do
        if not (k == "max_steps" and flags.max_finetune_steps) then second.trainer[k] = first.trainer[k] end
    end
end

-- num_train_steps counts micro-batches.
local function limit(tree, n)
    local t = tree.trainer
    local most = math.floor(n * t.num_train_epochs / t.gradient_accumulation_steps)
    t.max_steps = t.max_steps and t.max_steps > 0 and math.min(t.max_steps, most) or most
end

-- A token for gated models goes to the Hub alone, not into the run's folder.
local function use_token(args, model)
    local token = args.huggingface_token or model.model.huggingface_token
    if not token then return end
    require("lolcats.hub.web").use_token(token, args.huggingface_token and "--huggingface_token" or "the configuration")
    local run = cli.current
    if run then
        run.values.huggingface_token = nil
        for i, word in ipairs(run.argv) do run.argv[i] = word == token and "..." or word:gsub("(token=).*", "%1...") end
    end
    args.huggingface_token, model.model.huggingface_token = nil, nil
end

--- What args (of lc.args with the rows of reference_flags) ask for: {model = the configuration, options = of
--- lc.linearize, or nil where attention stays softmax; first, second = experiments, or nil; second_name; trains_first;
--- compat; first_lora = options of student:add_lora for the first stage, or nil; rounded = training state has
--- bfloat16's digits; paths; path, dtype = of the model; chunk; load() = the model, frozen; folder(checkpoint) = of its
--- run}.
function M.read(args)
    local flags = flags_of.check(args)
    local out = { compat = args.compat == "reference" }
    flags.model_config = flags.model_config:gsub("^scaled/", "") -- names are those of that branch
    local model = configs.override_model(configs.load("model", args.model_config, args.config_dir), flags)
    use_token(args, model)
    local first = args.distill_config and
        configs.override_experiment(configs.load("experiment", args.distill_config, args.config_dir), flags) or nil
    for k, v in pairs(first and model.optimizer or {}) do first.optimizer[k] = v end
    local options = configs.linearize_options(model)
    if options and args.compat ~= "none" then options.compat = args.compat end
    if first and not options then log.say "softmax attention has nothing to learn from softmax: no first stage" end
    local loads = args.load_distill_checkpoint and not args.resume_distill
    out.trains_first = options and first and first.trainer.name and not loads and not args.no_distill
    out.first_lora = options and configs.first_lora_options(model)
    if out.first_lora and args.layers_per_model then
        lc.fail("attention.peft: adapters of the first stage are not for blocks of layers")
    end
    out.model, out.first, out.options, out.chunk = model, first, options, model.attention.state_chunk_len
    out.paths = names.paths(flags, out.trains_first and first.trainer or nil, { fsdp = args.enable_fsdp })

    local name, tuned = args.final_finetune_config or args.finetune_config, args.load_finetune_checkpoint
    if args.resume_finetune and not name and tuned then -- the checkpoint's name says which it was
        name = configs.full_name("experiment", names.parse(tuned).finetune or "", args.config_dir) or
            cli.usage "--resume-finetune needs --finetune-config"
    end
    out.second_name = name
    if name then
        out.second = second_of(args, flags, name)
        if out.compat and out.trains_first then let_first_stand(first, out.second, flags) end
    end
    if args.verbose then
        print(files.to_json({ model = model, distill = first, finetune = out.second }, { indent = 2 }))
    end
    local n = args.num_train_steps
    for _, tree in ipairs { first or false, out.second or false } do
        if tree and n and n > 0 then limit(tree, n) end
    end

    out.path = model.model.pretrained_model_name_or_path
    out.dtype = args.dtype ~= "" and args.dtype or model.model.torch_dtype
    -- there all of it has the weights' dtype
    out.rounded = out.compat and (out.dtype == "bf16" or out.dtype == "bfloat16")
    function out.load()
        local teacher = lc.load(out.path, { dtype = out.dtype, device = args.device }):freeze()
        configs.check_model(model, teacher.config)
        if model.model.peft_id then -- an adapter that the model starts with
            teacher = require("lolcats.peft").load(teacher, lc.hub.resolve(model.model.peft_id)):merge_lora()
        end
        return teacher
    end
    function out.folder(file)
        return require("lolcats.reference_checkpoint").fits((file:gsub("_%a+%.pt$", "") .. ".run"))
    end
    return out
end

return M
