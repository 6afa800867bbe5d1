-- test_families.lua: every family of decoders against transformers: weights made from nothing by a formula, and logits
-- in float64 that transformers gave for them (tests/peers/models.py --numbers), of one forward and of a prefill with
-- single steps; then linearized, with adapters, saved and read.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"

local CASES = {
    { name = "llama", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 },
      stepped = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 } },
    { name = "llama_biases", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}]],
      whole = { -2.0754206, 0.5263282355, -0.2652140579, -0.1918036405, -0.5782345863 },
      stepped = { -2.0754206, 0.5263282355, -0.2652140579, -0.1918036405, -0.5782345863 } },
    { name = "llama_head_dim", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -0.5495681858, 1.47796353, 0.1924114075, 1.285585476, -0.7956235304 },
      stepped = { -0.5495681858, 1.47796353, 0.1924114075, 1.285585476, -0.7956235304 } },
    { name = "llama_linear", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 3.0, "rope_theta": 10000.0, "rope_type": "linear"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -0.6983567234, 1.635624341, -0.2088149558, -0.4564268792, -0.8858499217 },
      stepped = { -0.6983567234, 1.635624341, -0.2088149558, -0.4564268792, -0.8858499217 } },
    { name = "llama_dynamic", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 20,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 2.5, "rope_theta": 10000.0, "rope_type": "dynamic"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.405983375, 1.466828038, -0.01801300808, -0.1805632785, -0.4199916314 },
      stepped = { -1.323626056, 1.460697655, -0.2092557305, -0.2491279701, -0.6028919641 } },
    { name = "llama_dynamic_short", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "dynamic"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 },
      stepped = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 } },
    { name = "llama_llama3", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0, "rope_type": "llama3"},
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.293365734, 0.9879356747, -0.09181535132, 0.6437695104, -0.736810157 },
      stepped = { -1.293365734, 0.9879356747, -0.09181535132, 0.6437695104, -0.736810157 } },
    { name = "llama_yarn", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 16,
        "rope_theta": 10000.0, "rope_type": "yarn"}, "tie_word_embeddings": false, "attention_bias": false,
        "mlp_bias": false}]],
      whole = { -1.171112669, 1.651103885, -0.6081437967, -0.1220898546, -0.980120826 },
      stepped = { -1.171112669, 1.651103885, -0.6081437967, -0.1220898546, -0.980120826 } },
    { name = "llama_yarn_mscale", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"beta_fast": 16.0, "beta_slow": 2.0, "factor": 4.0, "mscale":
        1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16, "rope_theta": 10000.0, "rope_type":
        "yarn", "truncate": false}, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.119995524, 1.576541362, -0.5903672143, -0.07885253828, -0.9188996776 },
      stepped = { -1.119995524, 1.576541362, -0.5903672143, -0.07885253828, -0.9188996776 } },
    { name = "llama_longrope", config = [[
        {"model_type": "llama", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 4.0, "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 24, "rope_theta": 10000.0, "rope_type": "longrope", "short_factor":
        [1.0, 1.1, 1.3, 1.5]}, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false}]],
      whole = { -1.38720905, 1.810752168, -0.06867138619, 0.05997406477, -0.5599052361 },
      stepped = { -0.6824257396, 1.37992173, -1.846158, -0.8501837498, -0.8828536744 } },
    { name = "mistral", config = [[
        {"model_type": "mistral", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "sliding_window": null}]],
      whole = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 },
      stepped = { -1.657908918, 0.9522844967, -0.02820511059, -0.3136251262, -0.2504957334 } },
    { name = "mistral_window", config = [[
        {"model_type": "mistral", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "sliding_window": 7}]],
      whole = { -2.101228035, 1.405746195, 0.7331514931, 2.508936615, -0.9885660914 },
      stepped = { -2.101228035, 1.405746195, 0.7331514931, 2.508936615, -0.9885660914 } },
    { name = "mistral_window_2", config = [[
        {"model_type": "mistral", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "sliding_window": 2}]],
      whole = { 0.8318978488, -0.6893149614, 2.285645302, 1.645715232, -1.682549005 },
      stepped = { 0.8318978488, -0.6893149614, 2.285645302, 1.645715232, -1.682549005 } },
    { name = "qwen2", config = [[
        {"model_type": "qwen2", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": false,
        "sliding_window": null, "use_sliding_window": false, "max_window_layers": 28}]],
      whole = { -1.774449079, 1.072123565, 0.07300611244, 0.0590435533, -0.4384053411 },
      stepped = { -1.774449079, 1.072123565, 0.07300611244, 0.0590435533, -0.4384053411 } },
    { name = "qwen2_tied", config = [[
        {"model_type": "qwen2", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "tie_word_embeddings": true,
        "sliding_window": null, "use_sliding_window": false, "max_window_layers": 28}]],
      whole = { -1.22230787, 1.307855569, -0.7717955712, 0.1434661749, -1.363795147 },
      stepped = { -1.22230787, 1.307855569, -0.7717955712, 0.1434661749, -1.363795147 } },
    { name = "qwen2_window", config = [[
        {"model_type": "qwen2", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": false,
        "sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1}]],
      whole = { -2.06390198, 0.7681741867, 0.2293687649, 0.3708505112, -0.1660444243 },
      stepped = { -2.06390198, 0.7681741867, 0.2293687649, 0.3708505112, -0.1660444243 } },
    { name = "qwen2_yarn", config = [[
        {"model_type": "qwen2", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
        "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0,
        "rope_type": "yarn"}, "tie_word_embeddings": false, "sliding_window": null, "use_sliding_window": false,
        "max_window_layers": 28}]],
      whole = { -0.7347179542, 1.587443714, -0.9736150193, 0.1199370501, -1.293945743 },
      stepped = { -0.7347179542, 1.587443714, -0.9736150193, 0.1199370501, -1.293945743 } },
    { name = "qwen3", config = [[
        {"model_type": "qwen3", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "attention_bias": false, "sliding_window": null, "use_sliding_window": false,
        "max_window_layers": 28}]],
      whole = { 1.641178859, -1.514755878, 1.423447098, 0.8531471969, -0.3311084549 },
      stepped = { 1.641178859, -1.514755878, 1.423447098, 0.8531471969, -0.3311084549 } },
    { name = "qwen3_biases", config = [[
        {"model_type": "qwen3", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": true, "attention_bias": true, "sliding_window": null, "use_sliding_window": false,
        "max_window_layers": 28}]],
      whole = { -0.167338095, 0.4069516286, 0.8210337337, 1.503908659, -0.9475646099 },
      stepped = { -0.167338095, 0.4069516286, 0.8210337337, 1.503908659, -0.9475646099 } },
    { name = "qwen3_window", config = [[
        {"model_type": "qwen3", "vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers":
        3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "attention_bias": false, "sliding_window": 5, "use_sliding_window": true,
        "max_window_layers": 28, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}]],
      whole = { 1.377887524, -0.630358524, 0.7265645027, 0.541168581, -0.8151146802 },
      stepped = { 1.377887524, -0.630358524, 0.7265645027, 0.541168581, -0.8151146802 } },
}

local scratch = os.tmpname()
os.remove(scratch)
files.make_dirs(scratch)

local IDS = {}
for i = 0, 29 do IDS[i + 1] = (7 * i * i + 3 * i + 5) % 91 end

-- Fills a weight by its name and place, as tests/peers/models.py does.
local function fill(name, w)
    local h, n, values = 7, w:numel(), {}
    for i = 1, #name do h = (h * 31 + name:byte(i)) % 65521 end
    for i = 0, n - 1 do
        local v = ((i * i % 65521) * 31337 + i * 97 + h * 613) % 65536 / 65536 - 0.5
        if w:dim() == 1 then v = v * 0.4 + (name:match "norm%.weight$" and 1 or 0) end
        values[i + 1] = v
    end
    w:copy_(lc.tensor(values, { dtype = "f64", device = "cpu" }):reshape(w.shape))
end

local function build(case, dtype)
    local model = lc.model(files.parse_json(case.config, case.name), { dtype = dtype })
    for _, name in ipairs(model:weight_names()) do fill(name, model.weights[name]) end
    return model
end

local function last(logits) return logits:select(2, -1):narrow(2, 1, 5):reshape(5):to("f64"):totable() end

local function whole(model) return lc.no_grad(function() return model:logits(IDS) end) end

-- Logits of a prefill of `first` ids and steps of one.
local function stepped(model, first)
    local state, rows, at = model:new_state(1), {}, 1
    while at <= #IDS do
        local part, n = {}, at == 1 and first or 1
        for i = at, at + n - 1 do part[#part + 1] = IDS[i] end
        rows[#rows + 1] = lc.no_grad(function() return model:lm_head(model:forward(part, { state = state })) end)
        at = at + n
    end
    model:drop_state(state)
    return lc.cat(rows, 2)
end

local function student_checks(model, case)
    local student = lc.linearize(model, { map = "hedgehog", window = 4 })
    t.ok(student:transfer(IDS) > 0, case.name .. ": transfer has a loss")
    student:use_linear():add_lora { rank = 2, targets = "all-linear" }
    lc.no_grad(function()
        for _, p in ipairs(lc.lora.parameters(student)) do p.tensor:detach():normal_(0, 0.1) end
    end)
    local all = whole(student)
    t.close(stepped(student, 11), all, 1e-9)
    student:save(scratch .. "/student")
    t.close(whole(require("lolcats.linearize").load(scratch .. "/student", { base = model })), all, 1e-9)
    student:loss(IDS):backward()
    for _, p in ipairs(student:trainable()) do t.ok(p.tensor.grad, p.name .. " has a gradient") end
    student:merge_lora()
    t.close(whole(student), all, 1e-9)
end

for i, case in ipairs(CASES) do
    t.test(case.name .. ": logits as transformers gives them", function()
        -- transformers makes the base of dynamic scaling in float32
        local limit = case.name:match "dynamic" and 1e-5 or 1e-8
        local model = build(case, "f64")
        t.close(last(whole(model)), case.whole, limit)
        t.close(last(stepped(model, 11)), case.stepped, limit)
        model:save_weights(scratch .. "/model")
        t.close(last(whole(lc.load(scratch .. "/model", { dtype = "f64" }))), case.whole, limit)
        local single = build(case, "f32")
        t.close(last(whole(single)), case.whole, 1e-4)
        t.close(last(stepped(single, 11)), case.stepped, 1e-4)
        -- the kinds that look at the text's length turn cached keys by an earlier one, as transformers does
        if not case.name:match "dynamic" and not case.name:match "longrope" then student_checks(model, case) end
    end)
end

t.test("a family is a small table", function()
    local config = require "lolcats.models.config"
    config.add_family { model_type = "llama_with_norms", architecture = "LlamaWithNormsForCausalLM", qk_norm = true,
                        bias = function() return { q_proj = true } end }
    local raw = files.parse_json(CASES[1].config, "config")
    raw.model_type = "llama_with_norms"
    local model = lc.model(raw)
    t.ok(model.weights["model.layers.0.self_attn.q_norm.weight"], "norms of q")
    t.ok(model.weights["model.layers.0.self_attn.q_proj.bias"], "a bias on q")
    t.ok(not model.weights["model.layers.0.self_attn.k_proj.bias"], "none on k")
    t.eq(whole(model):size(3), 91)
end)

local JUNK = { 0, 1, -1, 2.5, 3, 1e300, "x", "", true, false, files.null, files.array {}, { 1 }, { "x" }, { a = 1 },
               { rope_type = "yarn" }, { rope_type = "longrope" }, { rope_type = "llama3" }, { rope_type = 3 } }

-- A config or metadata with one value replaced is taken or refused with its place, and never breaks the program.
local function each_junk(table_of, keys, run)
    for _, key in ipairs(keys) do
        for _, value in ipairs(JUNK) do
            local raw = table_of()
            raw[key] = value
            local ok, err = pcall(run, raw)
            if not ok then
                local text = tostring(type(err) == "table" and err.message or err)
                t.ok(text:find("the place", 1, true) and not text:find("attempt to", 1, true),
                     ("%s = %s: %s"):format(key, files.to_json(value), text))
            end
        end
    end
end

t.test("a config of any shape is read or refused", function()
    local config = require "lolcats.models.config"
    for _, family in ipairs { "llama", "mistral", "qwen2", "qwen3" } do
        local function made()
            local raw = files.parse_json(CASES[1].config, "config")
            raw.model_type, raw.use_sliding_window, raw.sliding_window = family, true, 4
            return raw
        end
        local keys = { "architectures", "quantization_config", "hidden_act", "rope_scaling", "rope_theta", "layer_types",
                       "num_local_experts", "partial_rotary_factor", "original_max_position_embeddings", "bos_token_id" }
        for key in pairs(made()) do keys[#keys + 1] = key end
        each_junk(made, keys, function(raw)
            local c = config.normalize(raw, "the place")
            if c.head_dim <= 64 and c.num_hidden_layers < 100 then
                local list = config.inv_freq(c, 100)
                t.eq(#list, c.head_dim / 2)
                files.to_json(config.to_json(c))
            end
        end)
    end
end)

t.test("GGUF metadata of any shape is read or refused", function()
    local config = require "lolcats.models.config"
    for _, arch in ipairs { "llama", "qwen2", "qwen3" } do
        local function made()
            return { ["general.architecture"] = arch, [arch .. ".embedding_length"] = 24, [arch .. ".block_count"] = 2,
                     [arch .. ".feed_forward_length"] = 40, [arch .. ".attention.head_count"] = 3, [arch .. ".vocab_size"] = 91,
                     [arch .. ".attention.head_count_kv"] = 1, [arch .. ".attention.layer_norm_rms_epsilon"] = 1e-5,
                     [arch .. ".rope.freq_base"] = 1e4, [arch .. ".context_length"] = 64,
                     [arch .. ".rope.dimension_count"] = 8, [arch .. ".attention.key_length"] = 8,
                     [arch .. ".attention.value_length"] = 8, [arch .. ".attention.sliding_window"] = 4 }
        end
        local keys = { arch .. ".expert_count", arch .. ".rope.scaling.type", arch .. ".rope.scaling.factor",
                       arch .. ".rope.scale_linear", arch .. ".rope.scaling.original_context_length", arch .. ".logit_scale" }
        for key in pairs(made()) do keys[#keys + 1] = key end
        each_junk(made, keys, function(raw)
            local function meta(key) if raw[key] ~= files.null then return raw[key] end end
            config.from_gguf(meta, function() return false end, function() end, "the place")
        end)
    end
end)

-- The teacher's window: what is computed on an op must be the definition, gradient too.
t.test("a sliding window is the last keys only, with its gradient and with padding", function()
    local attention = require "lolcats.attention"
    for _, w in ipairs { 1, 3, 8, 40 } do
        local function leaf(seed)
            lc.manual_seed(seed)
            return lc.randn({ 2, 2, 21, 8 }, { dtype = "f64" }):requires_grad_()
        end
        local grads = {}
        for form = 1, 2 do
            local q, k, v = leaf(1), leaf(2), leaf(3)
            local y = form == 1 and attention.softmax(q, k, v, { window = w }) or
                      attention.quadratic_softmax(q, k, v, w)
            y:square():sum():backward()
            grads[form] = { y, q.grad, k.grad, v.grad }
        end
        for i = 1, 4 do t.close(grads[1][i], grads[2][i], 1e-9) end
    end
end)

t.finish()
