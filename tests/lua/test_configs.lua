-- The reference's configurations: every file under recipes/configs parses to the values in reference_configs.lua and to
-- nothing more; names, suggestions, flags laid over values, and what the keys mean here.
local here = (arg and arg[0] or ""):match "^(.*/)"
local t = dofile(here .. "harness.lua")
local lc = require "lolcats"
local files, configs = lc.files, require "lolcats.configs"
local program = require "lolcats.program"
local expected = dofile(here .. "reference_configs.lua")

local function rows_of(text)
    local out = {}
    for line in text:gmatch "[^\n]+" do
        if line:match "^%s" then out[#out] = out[#out] .. " " .. line:match "^%s*(.*)" else out[#out + 1] = line end
    end
    return out
end

local function words(s)
    local out = {}
    for word in s:gmatch "%S+" do out[#out + 1] = word end
    return out
end

-- A word as YAML would read it.
local function value(s)
    if s == "null" then return files.null elseif s == "true" then return true elseif s == "false" then return false end
    return tonumber(s) or s
end

local function list(s)
    local out = {}
    for x in s:gmatch "[^,]+" do out[#out + 1] = value(x) end
    return out
end

local function pairs_of(s, into)
    local out = into or {}
    for _, word in ipairs(words(s)) do
        local k, v = word:match "^([%w_]+)=(.*)$"
        out[k] = value(v)
    end
    return out
end

local function model(row)
    local w = words(row)
    local name, path, cache, map, low, attn, theta, rope, kind = unpack(w, 1, 9)
    local out = {
        model = {
            pretrained_model_name_or_path = path, cache_dir = value(cache), return_dict = true, load_in_8bit = false,
            load_in_4bit = false,
            device_map = value(map), low_cpu_mem_usage = value(low), torch_dtype = "bfloat16",
            attn_implementation = attn,
            rope_theta = tonumber(theta),
        },
        attention = { attention_type = kind },
    }
    if rope ~= "-" then
        out.model.rope_scaling = { factor = 8, low_freq_factor = 1, high_freq_factor = 4,
                                   original_max_position_embeddings = 8192,
                                   [rope] = "llama3" }
    end
    if kind == "softmax" then return name, out end
    out.name = "llama"
    local a = out.attention
    a.feature_map, a.feature_map_kwargs, a.layer_idx = w[12], { eps = 1e-12, fullspace = true }, files.null
    a.learned_kernel, a.tie_qk_kernels, a.train_qk = "untied_head_einsum", false, false
    a.learned_kernel_kwargs = { feature_dim = tonumber(w[13]), skip_connection = false, bias = value(w[14]),
                                zero_init = false }
    if w[10] ~= "-" then a.state_chunk_len = tonumber(w[10]) end
    if w[11] ~= "-" then
        a.window_size, a.affine_attention_factors, a.init_window_factor = tonumber(w[11]), false, -2.1972245773362196
    end
    for k, v in (w[15] or ""):gmatch "([%w_]+)=([^;]+)" do a[k] = k == "softmax_attentions" and list(v) or value(v) end
    return name, out
end

local function named(text)
    local out = {}
    for _, row in ipairs(rows_of(text)) do
        local k, v = row:match "^(%S+) (.*)$"
        out[k] = v
    end
    return out
end
local DATA, TOKENIZERS = named(expected.data), named(expected.tokenizers)

local function experiment(row)
    local part = {}
    for s in (row .. " | "):gmatch "(.-) | " do part[#part + 1] = s end
    local d, m, workers, schedule, fsdp, bare = unpack(words(part[2]))
    local kind, rest = DATA[d]:match "^(%S+) (.*)$"
    local config = pairs_of(rest)
    for _, k in ipairs { "train_data", "eval_data" } do
        if config[k] then config[k] = { config[k] } end
    end
    local out = {
        dataset = { name = kind, dataset_config = config, pretrained_model_config = pairs_of(TOKENIZERS[m]),
                    preprocess_config = files.null },
        dataloader = { batch_size = 1, num_workers = tonumber(workers), drop_last = false, pin_memory = true },
        optimizer = pairs_of(part[3]),
        lr_scheduler = schedule == "none" and { lr_scheduler_type = "none" }
            or { lr_scheduler_type = "reduce_lr_on_plateau", mode = "min", factor = 0.1, patience = 10, min_lr = 1e-5 },
    }
    if bare then
        out.trainer = pairs_of(part[4])
    else
        local name = part[4]:match "name=(%S+)"
        out.trainer = pairs_of(part[4], {
            bf16 = true, train_split = "train", val_split = "validation", num_train_epochs = 2,
            gradient_accumulation_steps = 8, seed = 42,
            batch_size = 1, load_best_model_at_end = true, greater_is_better = false, logging_steps = 100,
            evaluation_strategy = "steps",
            max_steps = -1, eval_steps = 100, max_eval_batches = files.null,
            metric_for_best_model = name == "default_lm" and "eval/loss" or "distill/eval/loss",
        })
    end
    if part[5] then
        local f = pairs_of(part[5])
        out.finetune = { method = f.method,
                         kwargs = { r = f.r, lora_alpha = f.lora_alpha, lora_dropout = f.lora_dropout,
                                                       target_modules = list(f.target_modules) } }
        if f.trainable_weights then out.finetune.trainable_weights = list(f.trainable_weights) end
    end
    if fsdp == "fsdp" then
        out.fsdp = { save_model = true, run_validation = true, use_fp16 = false, save_optimizer = false,
                     gradient_clipping = true,
                     gradient_clipping_threshold = 1 }
    end
    return "experiment/" .. part[1], out
end

local function parse(name)
    local path = "recipes/configs/" .. name .. ".yaml"
    return files.parse_yaml(program.source(path) or error("there is no " .. path), path)
end

local seen = {}
t.test("every file holds the reference's keys and values", function()
    for _, how in ipairs { { expected.models, model }, { expected.experiments, experiment } } do
        for _, row in ipairs(rows_of(how[1])) do
            local name, want = how[2](row)
            seen[name] = true
            t.eq(parse(name), want, name)
        end
    end
end)

t.test("there are no other files, and every one can be read by name", function()
    local n = 0
    for _, path in ipairs(program.files()) do
        local name = path:match "^recipes/configs/(.+)%.yaml$"
        if name then
            n = n + 1
            t.ok(seen[name], name .. " is not in the table")
            local kind, rest = name:match "^(%a+)/(.+)$"
            if kind == "scaled" then
                kind, rest = rest:match "^(%a+)/(.+)$"
                rest = "scaled/" .. rest
            end
            t.ok(configs.load(kind, rest).model or configs.load(kind, rest).dataset)
        end
    end
    t.eq(n, 59)
    t.eq(#configs.names "model", 27)
    t.eq(#configs.names "experiment", 32)
end)

t.test("names: suggestions, folders of one's own, files", function()
    t.errors(configs.find, "did you mean distill_mistral_7b_lk_smd_wtk64_fd64_w01", "model",
             "distill_mistral_7b_lk_smd_wtk64_fd64_w1")
    t.errors(configs.find, "did you mean llama3_1_8b/finetune_qkvo_rp_clean", "experiment", "finetune_qkvo_rp_clean")
    t.errors(configs.find, "no experiment configuration", "experiment", "../../secret")
    local dir = os.tmpname()
    os.remove(dir)
    files.make_dirs(dir .. "/experiment/mine")
    files.write(dir .. "/experiment/mine/a.yaml",
                "dataset: {name: alpaca_clean}\ntrainer: {name: default_lm, max_steps: null}\n")
    local tree = configs.load("experiment", "mine/a", dir)
    t.eq(tree.trainer, { name = "default_lm" })
    t.eq(configs.load("experiment", dir .. "/experiment/mine/a.yaml").dataset.name, "alpaca_clean")
    t.ok(table.concat(configs.names("experiment", dir), " "):find("mine/a", 1, true))
    files.make_dirs(dir .. "/model")
    files.write(dir .. "/model/bare.yaml", "model: {}\nattention: {attention_type: lolcats_llama, learned_kernel: null, window_size: null}\n")
    tree = configs.load("model", "bare", dir)
    t.eq({ tree.attention.learned_kernel, tree.attention.window_size, configs.linearize_options(tree).kernel }, { "none", nil, "none" })
    t.eq({ configs.full_name("model", "bare", dir), configs.full_name("experiment", "a", dir), configs.full_name("model", "bar", dir),
           configs.full_name("experiment", "rp_finetune_llama_40b_qv_hparams") },
         { "bare", "mine/a", nil, "llama3_1_405b/rp_finetune_llama_40b_qv_hparams" })
    files.write(dir .. "/experiment/bad.yaml", "- 1\n")
    t.errors(configs.load, "a map of blocks", "experiment", "bad", dir)
    files.write(dir .. "/experiment/bad.yaml", "dataset: {}\n")
    t.errors(configs.load, "'trainer' is missing", "experiment", "bad", dir)
    os.execute("rm -rf '" .. dir .. "'")
end)

t.test("flags over values", function()
    local e = configs.override_experiment(configs.load("experiment", "distill_alpaca_clean_xent0_mse1000_lr1e-2"),
        { lr = 1e-3, weight_decay = 0.1, optim = "sgd", scheduler = "linear", max_steps = 7, seed = 3,
          dataset_chunk_size = 256 })
    t.eq({ e.optimizer.lr, e.optimizer.weight_decay, e.optimizer.optim, e.lr_scheduler.lr_scheduler_type,
           e.trainer.max_steps, e.trainer.seed,
           e.dataset.dataset_config.chunk_size }, { 1e-3, 0.1, "sgd", "linear", 7, 3, 256 })
    e = configs.override_experiment(configs.load("experiment", "finetune_lora_qkvo_alpaca_clean"),
                                    { lr = 1e-3, optim = "sgd" }, true)
    t.eq({ e.optimizer.lr, e.optimizer.optim }, { 1e-4, "sgd" })
    local m = configs.override_model(configs.load("model", "distill_mistral_7b_lk_smd_wtk64_fd64_w01"),
        { lk_zero_init = true, window_size = 16, attention_type = "lolcats_llama_window_sw",
          pretrained_model_name_or_path = "x/y" })
    t.eq(configs.linearize_options(m), {
        attention = "lolcats_llama_window_sw", map = "softmax_dim", kind = "sliding", window = 16, feature_dim = 64,
        full = true, bias = false, skip = false, init = "identity",
        window_factor = -2.1972245773362196, affine = false, train_window_factor = true })
    t.eq(m.model.pretrained_model_name_or_path, "x/y")
end)

t.test("what the keys mean", function()
    t.eq(configs.linearize_options(configs.load("model", "distill_llama3_8b_lk_t2r")), {
        attention = "lolcats_llama", map = "relu", kind = "linear", window = 0, feature_dim = 128, full = true,
        bias = true, skip = false, init = "kaiming",
        window_factor = 0, affine = false, train_window_factor = true })
    t.eq(configs.linearize_options(configs.load("model", "base_llama3_8b")), nil)
    t.eq(configs.linearize_options(configs.load("model",
                                                "llama3_1_8b/distill_llama_3_8b_lk_smd_wtk64_fd64_w01_attn4layers")).softmax_layers,
         { 8, 16, 24, 32 })
    local o = configs.linearize_options { attention = { attention_type = "lolcats_llama_window_tk_gen",
                                                        feature_map = "exp_dim",
        learned_kernel = "untied_head_adapter", learned_kernel_kwargs = { hidden_dim = 32 }, tie_qk_kernels = true } }
    t.eq({ o.kind, o.window, o.kernel, o.hidden_dim, o.tie_qk }, { "terrace", 64, "adapter", 32, true })
    t.eq(configs.linearize_options({ attention = { attention_type = "lolcats_llama",
                                                   learned_kernel = files.null } }).kernel, "none")
    o = configs.linearize_options { attention = { attention_type = "lolcats_llama", eps = 1e-6, feature_map_kwargs = { eps = 1e-4 } } }
    t.eq({ o.eps, o.feature_eps }, { 1e-6, 1e-4 })
    t.errors(configs.linearize_options, "did you mean '?lolcats_llama_window_tk'?%?",
             { attention = { attention_type = "lolcats_llama_window_tkk" } })
    local lora, train = configs.lora_options(configs.load("experiment", "finetune_lora_fqkvo_alpaca_clean"))
    t.eq(lora, { rank = 8, alpha = 16, targets = { "q_proj", "k_proj", "v_proj", "o_proj" } })
    t.eq(train, { "feature%_map%_q%.mlp%.layer", "feature%_map%_k%.mlp%.layer", "window%_factors" })
    t.eq(configs.length(configs.load("experiment", "llama3_1_8b/finetune_qkvo_rp_clean")),
         { epochs = 2, max_steps = 2500, accumulate = 8, eval_every = 100 })
    t.eq(configs.length(configs.load("experiment", "llama3_1_70b/distill_rp_llama_70b_xent0_mse1000_lr1e-2")).max_steps, 2500)
    local o = configs.optimizer(configs.load("experiment", "distill_alpaca_clean_xent0_mse1000_lr1e-2"))
    t.eq({ o.kind, o.lr, o.opts.weight_decay }, { "adamw", 0.01, 0 })
    o = configs.optimizer(configs.load("experiment", "llama3_1_405b/rp_distill_llama_405b_xent1_mse1000_lr1e-2"))
    t.eq({ o.kind, o.lr, o.opts.weight_decay }, { "adamw", 0.01, 0.01 })
    local s = configs.schedule(configs.load("experiment", "finetune_lora_qkvo_alpaca_clean"))
    t.eq({ s.kind, s.opts.factor, s.opts.patience, s.opts.min_lr, s.opts.mode }, { "plateau", 0.1, 10, 1e-5, "min" })
    t.eq(configs.schedule(configs.load("experiment", "no_distill_alpaca_clean")).kind, "constant")
end)

t.test("every configuration can be used: attention, optimizer, schedule, trainer, data set", function()
    local dir = os.tmpname()
    os.remove(dir)
    lc.manual_seed(1)
    require("lolcats.tiny").write_model(dir, "llama3", { num_hidden_layers = 32, hidden_size = 16, intermediate_size = 16,
                                                         num_attention_heads = 2, num_key_value_heads = 1 })
    local linear = 0
    for _, name in ipairs(configs.names "model") do
        local options = configs.linearize_options(configs.load("model", name))
        if options then
            linear = linear + 1
            lc.scope(function()
                local loss = lc.linearize(lc.load(dir), options):transfer({ { 1, 2, 3, 4, 5, 6 } }, { backward = false })
                t.ok(loss == loss and loss >= 0, name)
            end)
        end
    end
    t.eq(linear, 23)
    for _, name in ipairs(configs.names "experiment") do
        local e = configs.load("experiment", name)
        t.ok(configs.optimizer(e).lr > 0 and configs.schedule(e) and configs.length(e), name)
        configs.lora_options(e)
        if e.trainer.name then t.ok(require("lolcats.train.trainers").find(e.trainer.name), name) end
        t.ok(require("lolcats.data.reference").LOADERS[e.dataset.name], name)
    end
    os.execute("rm -rf '" .. dir .. "'")
end)

t.finish()
