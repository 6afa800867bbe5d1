-- configs.lua: the reference's YAML configurations (lc.configs). Finds one by name (in a folder of the user's, then
-- among the program's own under recipes/configs), reads and checks it, lays command-line flags over it, and says what
-- its keys mean here: options of lc.linearize, of LoRA, of an optimizer and of a schedule.
local lc = require "lolcats"
local files = require "lolcats.files"
local cli = require "lolcats.cli"
local program = require "lolcats.program"

local M = {}

local KINDS = { model = true, experiment = true }

-- ---- finding and reading --------------------------------------------------------------------------------------------
local function folders_below(root, prefix, out)
    for _, name in ipairs(files.is_folder(root) and files.list(root) or {}) do
        local path = root .. "/" .. name
        if files.is_folder(path) then
            folders_below(path, prefix .. name .. "/", out)
        elseif name:match "%.yaml$" then
            out[#out + 1] = prefix .. name:gsub("%.yaml$", "")
        end
    end
    return out
end

--- Names of the configurations of a kind ("model" or "experiment"), sorted: those of `dir` and the program's own.
function M.names(kind, dir)
    local seen, out = {}, {}
    local function add(name)
        if not seen[name] then seen[name], out[#out + 1] = true, name end
    end
    if dir then
        for _, name in ipairs(folders_below(dir .. "/" .. kind, "", {})) do add(name) end
    end
    for _, path in ipairs(program.files()) do
        local name = path:match("^recipes/configs/" .. kind .. "/(.+)%.yaml$")
        local scaled = path:match("^recipes/configs/scaled/" .. kind .. "/(.+)%.yaml$")
        if name or scaled then add(name or "scaled/" .. scaled) end
    end
    table.sort(out)
    return out
end

--- The text of a configuration and where it stands. name: as under configs/KIND/, with or without .yaml; scaled/NAME
--- for the one of the branch for large models, where both have the name; or a file's path.
function M.find(kind, name, dir)
    if not KINDS[kind] then lc.fail("configs: a kind is 'model' or 'experiment', not '%s'", tostring(kind)) end
    if type(name) ~= "string" or name == "" then lc.fail("configs: the name of a %s configuration is missing", kind) end
    local short = name:gsub("%.yaml$", "")
    for _, path in ipairs { dir and ("%s/%s/%s.yaml"):format(dir, kind, short) or false,
                            name:match "%.yaml$" and name or false } do
        if path and files.is_file(path) then return files.read(path), path end
    end
    local scaled = short:match "^scaled/(.+)$" -- the other branch's file, where both have one of that name
    local path = ("recipes/configs/%s%s/%s.yaml"):format(scaled and "scaled/" or "", kind, scaled or short)
    local text = not short:find("..", 1, true) and program.source(path)
    if text then return text, path end
    local names = M.names(kind, dir)
    local near = cli.suggest(short, names)
    if not near then -- a name without its folder
        for _, other in ipairs(names) do
            if other:match "[^/]+$" == short then near = other end
        end
    end
    cli.usage("there is no %s configuration '%s'%s%s", kind, name, near and ("; did you mean %s?"):format(near) or "",
              dir and (" (looked in %s/%s, then among the program's own)"):format(dir, kind) or "")
end

--- The name of a configuration under which M.find has it: as given, or with its folder where a single one ends in it (a
--- checkpoint's name may have lost the folder); nil where there is none.
function M.full_name(kind, name, dir)
    local found
    for _, other in ipairs(M.names(kind, dir)) do
        if other == name then return other end
        if other:match "[^/]+$" == name then
            if found then return nil end
            found = other
        end
    end
    return found
end

local function without_nulls(v)
    if v == files.null then return nil end
    if type(v) ~= "table" then return v end
    local out = {}
    for k, x in pairs(v) do out[k] = without_nulls(x) end
    return out
end

-- What a block may hold. A key that is not here is told, for the reference passes it over in silence.
local function set(text)
    local out = {}
    for word in text:gmatch "%S+" do out[word] = true end
    return out
end
local KEYS = {
    model = {
        [""] = set "name model attention optimizer",
        model = set [[
            pretrained_model_name_or_path cache_dir return_dict load_in_8bit load_in_4bit device_map low_cpu_mem_usage
            torch_dtype attn_implementation rope_theta rope_scaling peft_id huggingface_token]],
        attention = set [[
            attention_type state_chunk_len window_size decode_window_size affine_attention_factors init_window_factor
            train_window_factor train_attention_weights feature_map feature_map_kwargs layer_idx learned_kernel
            learned_kernel_kwargs tie_qk_kernels train_qk softmax_attentions peft peft_config rotary_config
            fp32_attention mask_value eps remove_base_attn state_grad_enabled mem_save]],
        ["attention.feature_map_kwargs"] = set "eps fullspace",
        ["attention.learned_kernel_kwargs"] = set "feature_dim skip_connection bias zero_init normal_init hidden_dim",
    },
    experiment = {
        [""] = set "dataset dataloader optimizer lr_scheduler trainer finetune fsdp",
        dataset = set "name dataset_config pretrained_model_config preprocess_config",
        ["dataset.dataset_config"] = set [[
            name path cache_dir chunk_size concat_data train_data eval_data max_eval_num max_length min_length
            chat_template seed use_c4 num_train_samples max_train_samples load_from_cache_file esl_model_config
            filter_by_esl dataloaders_dir filter_window]],
        ["dataset.pretrained_model_config"] = set "pretrained_model_name_or_path cache_dir",
        dataloader = set "batch_size num_workers drop_last pin_memory",
        optimizer = set [[
            optim lr weight_decay betas eps momentum dampening nesterov max_optimizer_steps clip_threshold decay_rate
            beta1 scale_parameter]],
        lr_scheduler = set [[
            lr_scheduler_type mode factor patience min_lr threshold threshold_mode cooldown eps num_warmup_steps
            num_training_steps num_cycles t_initial lr_min t_mul cycle_mul decay_rate cycle_decay warmup_t
            warmup_lr_init warmup_prefix cycle_limit]],
        trainer = set [[
            name bf16 train_split val_split num_train_epochs gradient_accumulation_steps seed batch_size
            load_best_model_at_end greater_is_better metric_for_best_model logging_steps evaluation_strategy max_steps
            max_finetune_steps eval_steps max_eval_batches num_save_ckpt_steps mse_factor xent_factor reverse_kl
            print_samples initial_eval layer_idx n_queries n_keys]],
        finetune = set "method kwargs trainable_weights layers_to_ignore",
        ["finetune.kwargs"] = set "r lora_alpha lora_dropout target_modules layers_to_transform",
        fsdp = set "save_model run_validation use_fp16 save_optimizer gradient_clipping gradient_clipping_threshold",
    },
}

-- Keys without a meaning, as "trainer.max_step (did you mean max_steps?)".
local function unknown_keys(kind, tree)
    local out = {}
    for place, keys in pairs(KEYS[kind]) do
        local at = tree
        for word in place:gmatch "[^.]+" do at = type(at) == "table" and at[word] or nil end
        for k in pairs(type(at) == "table" and at or {}) do
            if not keys[k] then
                local names = {}
                for name in pairs(keys) do names[#names + 1] = name end
                local near = cli.suggest(tostring(k), names)
                out[#out + 1] = (place == "" and "" or place .. ".") .. tostring(k) ..
                    (near and (" (did you mean %s?)"):format(near) or "")
            end
        end
    end
    table.sort(out)
    return out
end

--- A configuration as a table; keys that are null are absent. Keys that mean nothing are named on stderr.
function M.load(kind, name, dir)
    local text, path = M.find(kind, name, dir)
    local tree = files.parse_yaml(text, path)
    if type(tree) ~= "table" or tree == files.null or #tree > 0 then
        lc.fail("%s: a map of blocks was expected", path)
    end
    local a = tree.attention
    if type(a) == "table" and a.learned_kernel == files.null then a.learned_kernel = "none" end -- not: as usual
    tree = without_nulls(tree)
    for _, key in ipairs(unknown_keys(kind, tree)) do
        require("lolcats.log").say("%s: the key %s has no meaning", path, key)
    end
    for _, block in ipairs(kind == "model" and { "model", "attention" } or { "dataset", "trainer" }) do
        if type(tree[block]) ~= "table" then lc.fail("%s: the block '%s' is missing", path, block) end
    end
    return tree
end

-- ---- flags over values ----------------------------------------------------------------------------------------------
local TRAINER_FLAGS = { "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_finetune_steps",
                        "eval_steps", "seed",
                        "max_eval_batches" }
local ATTENTION_FLAGS = { "attention_type", "learned_kernel", "tie_qk_kernels", "train_qk", "state_chunk_len",
                          "window_size" }
local KERNEL_FLAGS = { lk_skip_connection = "skip_connection", lk_zero_init = "zero_init",
                       lk_normal_init = "normal_init" }

--- Lays flags over an experiment's values. finetune: lr and weight_decay are the first stage's alone.
function M.override_experiment(tree, flags, finetune)
    local function block(name)
        tree[name] = tree[name] or {}
        return tree[name]
    end
    if flags.dataset then block("dataset").name = flags.dataset end
    if flags.dataset_chunk_size then tree.dataset.dataset_config.chunk_size = flags.dataset_chunk_size end
    if not finetune then
        if flags.lr then block("optimizer").lr = flags.lr end
        if flags.weight_decay then block("optimizer").weight_decay = flags.weight_decay end
    end
    if flags.optim then block("optimizer").optim = flags.optim end
    if flags.scheduler then block("lr_scheduler").lr_scheduler_type = flags.scheduler end
    if flags.batch_size then block("dataloader").batch_size = flags.batch_size end
    for _, name in ipairs(TRAINER_FLAGS) do
        if flags[name] ~= nil then tree.trainer[name] = flags[name] end
    end
    return tree
end

--- Lays flags over a model's values.
function M.override_model(tree, flags)
    for _, name in ipairs(ATTENTION_FLAGS) do
        if flags[name] ~= nil then tree.attention[name] = flags[name] end
    end
    for flag, key in pairs(KERNEL_FLAGS) do
        if flags[flag] ~= nil then
            tree.attention.learned_kernel_kwargs = tree.attention.learned_kernel_kwargs or {}
            tree.attention.learned_kernel_kwargs[key] = flags[flag]
        end
    end
    if flags.pretrained_model_name_or_path then
        tree.model.pretrained_model_name_or_path = flags.pretrained_model_name_or_path
    end
    return tree
end

-- ---- what the keys mean ---------------------------------------------------------------------------------------------
-- An eps that is not what it is anyway.
local function unusual(eps) return eps ~= 1e-12 and eps or nil end

--- Options of lc.linearize for a model configuration; nil when its attention stays softmax. What an attention_type
--- means stands in attention_types.lua; feature_map may be any built-in map, learned_kernel any kernel
--- (none, or null in a file: nothing is learned).
function M.linearize_options(tree)
    local a = tree.attention
    local found = require("lolcats.attention_types").find(a.attention_type)
    if found.options.softmax then return nil end
    local kind = found.options.kind
    if a.decode_window_size and a.decode_window_size ~= (a.window_size or 64) then
        require("lolcats.log").say("decode_window_size %s: decoding has the window of training here, %s",
                                   tostring(a.decode_window_size), tostring(a.window_size or 64))
    end
    local k, f = a.learned_kernel_kwargs or {}, a.feature_map_kwargs or {}
    local keep
    for _, i in ipairs(a.softmax_attentions or {}) do -- they count layers from 0
        keep = keep or {}
        keep[#keep + 1] = i + 1
    end
    local kernel = a.learned_kernel == files.null and "none" or a.learned_kernel and
        require("lolcats.maps.kernels").name(a.learned_kernel, a.feature_map) or nil
    local train_factor = a.train_window_factor ~= false
    if found.options.train_window_factor == false then train_factor = false end
    return {
        attention = a.attention_type, map = a.feature_map or "softmax_dim", kind = kind,
        window = kind ~= "linear" and (found.options.window or a.window_size or 64) or 0,
        feature_dim = k.feature_dim, full = f.fullspace ~= false, bias = k.bias or false,
        skip = k.skip_connection or false,
        kernel = kernel ~= "untied" and kernel or nil, hidden_dim = k.hidden_dim, tie_qk = a.tie_qk_kernels or nil,
        init = k.normal_init and "normal" or k.zero_init and "identity" or "kaiming",
        window_factor = a.init_window_factor or 0, affine = a.affine_attention_factors or false, softmax_layers = keep,
        train_window_factor = train_factor, rotary = a.rotary_config, eps = unusual(a.eps),
        feature_eps = unusual(f.eps),
    }
end

--- Options of student:add_lora for adapters that learn in the first stage (attention.peft or peft_config, in the form
--- of a finetune block), or nil.
function M.first_lora_options(tree)
    local block = tree.attention.peft or tree.attention.peft_config
    if not block then return nil end
    return (M.lora_options { finetune = { method = block.method or "lora", kwargs = block.kwargs } })
end

--- What of a model block cannot be taken as it says: raises for quantised loading, tells rotary settings that the model
--- itself has otherwise. config: the loaded model's.
function M.check_model(tree, config)
    local m = tree.model
    if m.load_in_8bit or m.load_in_4bit then
        lc.fail("load_in_8bit and load_in_4bit are not built (in the reference neither); a quantised GGUF file " ..
                "loads as it is")
    end
    if m.rope_theta and config.rope_theta and m.rope_theta ~= config.rope_theta then
        require("lolcats.log").say("the configuration has rope_theta %g, the model itself %g: the model's counts",
                                   m.rope_theta,
                                   config.rope_theta)
    end
end

local PROJECTIONS = set "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

--- Options of student:add_lora for a fine-tuning block, and patterns of other parameters that it trains.
function M.lora_options(tree)
    local f = tree.finetune or {}
    local train = {}
    for i, name in ipairs(f.trainable_weights or {}) do train[i] = (name:gsub("%p", "%%%0")) end
    if f.method ~= "lora" then return nil, train end
    local k, targets = f.kwargs or {}, {}
    for i, name in ipairs(k.target_modules or { "q_proj", "k_proj", "v_proj", "o_proj" }) do
        local short = name:match "[^.]+$"
        if not PROJECTIONS[short] then lc.fail("target_modules: '%s' names no projection", tostring(name)) end
        targets[i] = short
    end
    return { rank = k.r or 8, alpha = k.lora_alpha or 16, targets = targets,
             dropout = (k.lora_dropout or 0) > 0 and k.lora_dropout or nil }, train
end

--- The optimizer of an experiment. A block without weight_decay has PyTorch's: 0.01 for AdamW, 0 for the others.
--- rounded: keep Adam's parameters and moments to bfloat16's digits, as the named implementation does.
function M.optimizer(tree, rounded)
    local o = tree.optimizer or {}
    local opts = {}
    for k, v in pairs(o) do
        if k ~= "optim" and k ~= "max_optimizer_steps" then opts[k] = v end
    end
    if rounded and tostring(o.optim or "adamw"):match "^adam" and o.optim ~= "adamax" then
        opts.rounded = o.optim == "adamw_torch_fused" and "fused" or "loop"
    end
    return require("lolcats.optim").named(o.optim or "adamw", opts)
end

--- The schedule of an experiment.
function M.schedule(tree)
    local s = tree.lr_scheduler or {}
    local opts = {}
    for k, v in pairs(s) do
        if k ~= "lr_scheduler_type" then opts[k] = v end
    end
    return require("lolcats.optim").named_schedule(s.lr_scheduler_type, opts)
end

--- How long an experiment trains, as options of lc.run. optimizer.max_optimizer_steps, a key of the scripts for many
--- GPUs, limits updates as its name says (there the first stage counts micro-batches).
function M.length(tree)
    local t, most = tree.trainer, tree.optimizer and tree.optimizer.max_optimizer_steps
    local steps = t.max_steps and t.max_steps > 0 and t.max_steps or nil
    if most then steps = math.min(steps or most, most) end
    return { epochs = t.num_train_epochs or 2, max_steps = steps, accumulate = t.gradient_accumulation_steps or 1,
             eval_every = t.eval_steps or 100 }
end

M.KEYS = KEYS
return M
