-- test_peft.lua: adapter folders of PEFT's form: written and read, on fresh models and on students; which modules a
-- pattern means; what must be refused by name; damaged files.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"
local lora = require "lolcats.lora"

local BASE = { model_type = "llama", vocab_size = 41, hidden_size = 16, intermediate_size = 24, num_hidden_layers = 3,
               num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 64, initializer_range = 0.3 }
local IDS = { { 3, 8, 5, 1, 40, 30, 7, 7, 2 }, { 9, 2, 0, 13, 21, 5, 33, 1, 1 } }

local scratch = os.tmpname()
os.remove(scratch)
files.make_dirs(scratch)
local count = 0

local function folder()
    count = count + 1
    return scratch .. "/" .. count
end

-- A base model on disk, made once for each kind.
local made = {}
local function base(kind)
    kind = kind or "llama"
    if not made[kind] then
        local raw = {}
        for k, v in pairs(BASE) do raw[k] = v end
        if kind == "tied" then raw.tie_word_embeddings = true else raw.model_type = kind end
        lc.manual_seed(4)
        made[kind] = folder()
        lc.model(raw, { dtype = "f64" }):save_weights(made[kind])
    end
    return lc.load(made[kind], { dtype = "f64" }), made[kind]
end

local function logits(m) return lc.no_grad(function() return m:logits(IDS) end) end

local function shake(m)
    lc.no_grad(function()
        for _, p in ipairs(lora.saved(m)) do
            p.tensor:detach():add_(lc.randn(p.tensor.shape, { dtype = "f64" }) * 0.3)
        end
    end)
end

local OPTIONS = {
    plain = { rank = 3, alpha = 7 },
    rslora = { rank = 4, alpha = 2, rslora = true, targets = "all-linear" },
    regex = { rank = 4, targets = [[.*layers\.(0|2)\..*(gate|q)_proj]] },
    patterns = { rank = 4, alpha = 8, rank_pattern = { k_proj = 2, ["layers\\.[01].*q_proj"] = 5 },
                 alpha_pattern = { v_proj = 1 } },
    layers = { rank = 2, layers = { 1, -1 }, targets = { "mlp.down_proj" } },
    modules = { rank = 2, modules_to_save = { "lm_head", "norm" } },
    ends = { rank = 2, targets = { "lm_head", "embed_tokens", "q_proj" } },
    biases = { rank = 2, kind = "qwen2", weights = { "model.layers.0.self_attn.q_proj.bias" } },
    tied_head = { rank = 2, kind = "tied", modules_to_save = { "lm_head" } },
    tied_both = { rank = 2, kind = "tied", modules_to_save = { "embed_tokens" }, tie_weights = true },
}

for name, options in pairs(OPTIONS) do
    t.test("written and read: " .. name, function()
        local opts = {}
        for k, v in pairs(options) do if k ~= "kind" then opts[k] = v end end
        local m, path = base(options.kind)
        local before = logits(m)
        m:add_lora(opts)
        if not options.modules_to_save then
            for _, p in ipairs(lora.parameters(m)) do
                local zero = p.name:match "lora_B" or p.name:match "embedding_A"
                if zero then t.eq(p.tensor:detach():abs():amax():item(), 0, p.name) end
            end
            t.close(logits(m), before, 0, "a fresh adapter changes nothing")
        end
        shake(m)
        local after, dir = logits(m), folder()
        t.ok((after - before):abs():amax():item() > 1e-3, "the adapter does something")
        m:save_adapter(dir)
        if name ~= "tied_both" then -- PEFT has no word in its file for what stays tied
            local again = lc.load(dir) -- the base is named in the config
            t.close(logits(again), after, 1e-4)
            again = base(options.kind):load_adapter(dir)
            t.close(logits(again), after, 1e-12)
            local loss = again:loss(IDS)
            loss:backward()
            for _, p in ipairs(again:trainable()) do t.ok(p.tensor.grad, p.name .. " learns") end
        end
        m:merge_lora()
        t.close(logits(m), after, 1e-10)
        m:unmerge_lora()
        t.close(logits(m), after, 1e-10)
        t.close(logits(lc.load(path, { dtype = "f64" })), before, 0, "the base's file is as it was")
    end)
end

t.test("on a student: saved, read, merged; the teacher stays as it is", function()
    local m = base()
    local before = logits(m)
    local s = lc.linearize(m, { map = "hedgehog", window = 4 }):use_linear()
    s:add_lora { rank = 2, targets = { "q_proj", "lm_head" }, rank_pattern = { lm_head = 3 },
                 modules_to_save = { "input_layernorm" } }
    shake(s)
    local after, dir = logits(s), folder()
    s:save(dir)
    local again = require("lolcats.linearize").load(dir, { base = (base()) })
    t.close(logits(again), after, 1e-12)
    local peft = folder()
    s:save_adapter(peft)
    local third = lc.linearize(base(), { map = "hedgehog", window = 4 }):use_linear()
    lc.no_grad(function()
        for i, p in ipairs(third:map_params()) do p.tensor:detach():copy_(s:map_params()[i].tensor) end
    end)
    third:load_adapter(peft)
    t.close(logits(third), after, 1e-12)
    s:merge_lora()
    t.close(logits(s), after, 1e-10)
    t.close(logits(m), before, 0)
end)

t.test("dropout is of training only, and keeps the mean", function()
    local m = base()
    m:add_lora { rank = 2, dropout = 0.5 }
    shake(m)
    t.close(logits(m), logits(m), 0, "no chance without gradients")
    local a, b = m:loss(IDS):item(), m:loss(IDS):item()
    t.ok(a ~= b, "chance with them")
    local loss = m:loss(IDS)
    loss:backward()
    t.ok(lora.parameters(m)[1].tensor.grad, "gradients through it")
end)

t.test("which modules are meant", function()
    local q = "model.layers.1.self_attn.q_proj"
    t.ok(lora.is_target({ "q_proj" }, q) and lora.is_target({ "self_attn.q_proj" }, q) and lora.is_target({ q }, q))
    t.ok(not lora.is_target({ "proj" }, q) and not lora.is_target({ "layers.1" }, q))
    t.ok(lora.is_target([[.*\.(q|k)_proj]], q) and not lora.is_target([[q_proj]], q))
    t.ok(lora.is_target("all-linear", q) and not lora.is_target("all-linear", "lm_head"))
    t.eq(lora.by_pattern({ q_proj = 3 }, q, 8, "x"), 3)
    t.eq(lora.by_pattern({ ["layers\\.\\d+\\.self_attn.*"] = 3 }, q, 8, "x"), 3)
    t.eq(lora.by_pattern({ ["^model.layers.1.*"] = 3 }, q, 8, "x"), 3)
    t.eq(lora.by_pattern({ ["layers.11.self_attn.q_proj"] = 3 }, q, 8, "x"), 8)
    t.errors(function() lora.by_pattern({ q_proj = 3, [".*q_proj"] = 4 }, q, 8, "x") end, "both match")
    t.errors(function() lora.is_target("(", q) end, "regular expression")
    t.errors(function() lora.is_target("((\\w|\\.)+)+[!?]", q:rep(20)) end, "matching")
end)

-- A good folder, changed: the config by a function, the tensors by another.
local function changed(config, tensors)
    local dir = folder()
    local m = base()
    m:add_lora { rank = 2, targets = { "q_proj" } }
    m:save_adapter(dir)
    local c, all = files.read_json(dir .. "/adapter_config.json"), {}
    local f = files.open_tensors(dir .. "/adapter_model.safetensors")
    for _, name in ipairs(f:names()) do all[name] = f:tensor(name):clone() end
    f:close()
    if config then config(c) end
    if tensors then tensors(all) end
    files.write_json(dir .. "/adapter_config.json", c)
    files.save_tensors(dir .. "/adapter_model.safetensors", all)
    return dir
end

t.test("what is computed in another way is refused by name", function()
    local Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    local function refused(pattern, config, tensors)
        local dir = changed(config, tensors)
        t.errors(function() base():load_adapter(dir) end, pattern)
    end
    refused("IA3", function(c) c.peft_type = "IA3" end)
    refused("use_dora", function(c) c.use_dora = true end)
    refused("lora_bias", function(c) c.lora_bias = true end)
    refused("trainable_token_indices", function(c) c.trainable_token_indices = { 1 } end)
    refused("of_tomorrow", function(c) c.of_tomorrow = { a = 1 } end)
    refused("pissa", function(c) c.init_lora_weights = "pissa_niter_4" end)
    refused("'r' must be", function(c) c.r = 0 end)
    refused("lora_alpha", function(c) c.lora_alpha = "8" end)
    refused("make it %[3, 16%]", function(c) c.r = 3 end)
    refused("modules_to_save", function(c) c.modules_to_save = { "score" } end)
    refused("not in the file", function(c) c.modules_to_save = { "lm_head" } end)
    refused("has no B", nil, function(all) all[Q .. "B.weight"] = nil end)
    refused("which this model does not have", nil, function(all)
        all["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = all[Q .. "A.weight"]
    end)
    refused("DoRA", nil, function(all) all[Q .. "magnitude_vector"] = lc.zeros(16) end)
    refused("NaN", nil, function(all) all[Q .. "A.weight"]:fill_(0 / 0) end)
    refused("is no part of this model", nil, function(all) all["base_model.model.score.weight"] = lc.zeros(2, 2) end)
    refused("does not say that it was trained", nil, function(all)
        all["base_model.model.model.norm.weight"] = lc.zeros({ 16 }, { dtype = "f64" })
    end)
    t.errors(function() base():load_adapter(scratch) end, "adapter_config.json")
    t.errors(function() base():save_adapter(folder()) end, "no adapters")
    local twice = changed()
    t.errors(function() base():load_adapter(twice):load_adapter(twice) end, "has an adapter already")
end)

t.test("a config of any shape is read or refused, never half", function()
    local junk = { 1, -1, 0.5, "x", "", true, false, files.null, files.array {}, { 1 }, { "x" }, { a = 1 }, { a = "b" },
                   1e300 }
    local keys = { "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
                   "use_rslora", "lora_dropout", "bias", "init_lora_weights", "layers_to_transform",
                   "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "use_dora" }
    local dir = changed()
    local text, plain = files.read(dir .. "/adapter_config.json"), logits((base()))
    for _, key in ipairs(keys) do
        for _, value in ipairs(junk) do
            local c = files.parse_json(text, "config")
            c[key] = value
            files.write_json(dir .. "/adapter_config.json", c)
            local m = base()
            local ok, err = pcall(m.load_adapter, m, dir)
            if not ok then
                t.close(logits(m), plain, 0, "as it was")
                err = tostring(type(err) == "table" and err.message or err)
                t.ok(err:find(dir, 1, true) or err:find("modules_to_save", 1, true),
                     ("%s = %s: %s"):format(key, files.to_json(value), err))
            end
        end
    end
end)

t.finish()
