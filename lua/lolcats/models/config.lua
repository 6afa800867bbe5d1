-- models/config.lua: one description of a Llama or Mistral decoder, from a Hugging Face config.json or from a GGUF's
-- metadata, and its rotary frequencies. What this library cannot compute exactly is refused here, by name.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

local FAMILIES = { llama = true, mistral = true }
local ARCHITECTURES = { LlamaForCausalLM = "llama", MistralForCausalLM = "mistral" }

local function clean(v)
    if v == files.null then return nil end
    if type(v) ~= "table" then return v end
    local out = {}
    for k, x in pairs(v) do out[k] = clean(x) end
    return out
end

local MOST = { num_hidden_layers = 10000 } -- a damaged count must not be believed before the file is looked at

local function need(c, key, where)
    local v, most = c[key], MOST[key] or 2 ^ 31 - 1
    if type(v) ~= "number" or v < 1 or v > most or v ~= math.floor(v) then
        lc.fail("%s: '%s' must be a whole number from 1 to %d, it is %s", where, key, most, tostring(v))
    end
    return v
end

local function check_scaling(s, where)
    if s == nil then return nil end
    local kind = s.rope_type or s.type or "default"
    if kind == "default" then return nil end
    local function number(key)
        if type(s[key]) ~= "number" or s[key] <= 0 then
            lc.fail("%s: rope_scaling of type '%s' needs a number above 0 as '%s', it is %s", where, kind, key,
                    tostring(s[key]))
        end
        return s[key]
    end
    if kind == "linear" then return { rope_type = "linear", factor = number "factor" } end
    if kind == "llama3" then
        return { rope_type = "llama3", factor = number "factor", low_freq_factor = number "low_freq_factor",
                 high_freq_factor = number "high_freq_factor",
                 original_max_position_embeddings = number "original_max_position_embeddings" }
    end
    lc.fail("%s: rope_scaling of type '%s' is not supported; default, linear and llama3 are", where, tostring(kind))
end

--- Checks and completes a config given with Hugging Face's keys. where: what to name in errors.
function M.normalize(raw, where)
    local c = clean(raw)
    if type(c) ~= "table" then lc.fail("%s: expected a JSON object", where) end
    local arch = c.architectures and c.architectures[1]
    local family = c.model_type or (arch and ARCHITECTURES[arch])
    if arch and not ARCHITECTURES[arch] then
        lc.fail("%s: architecture '%s' is not supported; LlamaForCausalLM and MistralForCausalLM are", where,
                tostring(arch))
    end
    if not FAMILIES[family] then
        lc.fail("%s: model_type '%s' is not supported; llama and mistral are", where, tostring(family))
    end
    for _, key in ipairs { "attention_bias", "mlp_bias", "rope_interleaved" } do
        if c[key] == true then lc.fail("%s: %s = true is not supported", where, key) end
    end
    if c.hidden_act and c.hidden_act ~= "silu" and c.hidden_act ~= "swish" then
        lc.fail("%s: hidden_act '%s' is not supported; silu is", where, tostring(c.hidden_act))
    end
    if c.quantization_config then
        lc.fail("%s: the weights are quantised (%s), which is not supported; GGUF is", where,
                tostring(c.quantization_config.quant_method or "unknown method"))
    end
    local h = need(c, "num_attention_heads", where)
    local hidden = need(c, "hidden_size", where)
    if not c.head_dim and hidden % h ~= 0 then
        lc.fail("%s: hidden_size %d is not a multiple of num_attention_heads %d and there is no head_dim", where,
                hidden, h)
    end
    c.num_key_value_heads = c.num_key_value_heads or h
    c.head_dim = c.head_dim or hidden / h
    local out = {
        model_type = family, architecture = family == "mistral" and "MistralForCausalLM" or "LlamaForCausalLM",
        hidden_size = hidden, intermediate_size = need(c, "intermediate_size", where),
        num_hidden_layers = need(c, "num_hidden_layers", where), num_attention_heads = h,
        num_key_value_heads = need(c, "num_key_value_heads", where), head_dim = need(c, "head_dim", where),
        vocab_size = need(c, "vocab_size", where), rms_norm_eps = c.rms_norm_eps or 1e-6,
        max_position_embeddings = c.max_position_embeddings or 2048,
        tie_word_embeddings = c.tie_word_embeddings == true,
        bos_token_id = c.bos_token_id, eos_token_id = c.eos_token_id,
        sliding_window = type(c.sliding_window) == "number" and c.sliding_window or nil,
    }
    local rope = c.rope_parameters or {}
    out.rope_theta = c.rope_theta or rope.rope_theta or 10000.0
    out.rope_scaling = check_scaling(c.rope_scaling or (c.rope_parameters and rope) or nil, where)
    if h % out.num_key_value_heads ~= 0 then
        lc.fail("%s: num_attention_heads %d is not a multiple of num_key_value_heads %d", where, h,
                out.num_key_value_heads)
    end
    if out.head_dim % 2 ~= 0 then
        lc.fail("%s: head_dim %d is odd; rotary embedding needs pairs", where, out.head_dim)
    end
    return out
end

--- From a GGUF's metadata. meta(key) gives a value or nil; has(name) says whether a tensor is there.
function M.from_gguf(meta, has, shape, where)
    local arch = meta "general.architecture"
    if arch ~= "llama" then
        lc.fail("%s: GGUF architecture '%s' is not supported; 'llama' (which Mistral files use too) is", where,
                tostring(arch))
    end
    local function get(key) return meta("llama." .. key) end
    if (get "expert_count" or 0) > 0 then lc.fail("%s: a mixture of experts is not supported", where) end
    local embd = shape "token_embd.weight"
    local heads = get "attention.head_count"
    local scaling, kind = nil, get "rope.scaling.type"
    if kind and kind ~= "none" then scaling = { rope_type = kind, factor = get "rope.scaling.factor" } end
    local c = M.normalize({
        model_type = "llama", hidden_size = get "embedding_length", intermediate_size = get "feed_forward_length",
        num_hidden_layers = get "block_count", num_attention_heads = heads,
        num_key_value_heads = get "attention.head_count_kv" or heads,
        head_dim = get "attention.key_length" or get "rope.dimension_count",
        vocab_size = embd and embd[1] or get "vocab_size", rms_norm_eps = get "attention.layer_norm_rms_epsilon",
        rope_theta = get "rope.freq_base", rope_scaling = scaling, max_position_embeddings = get "context_length",
        tie_word_embeddings = not has "output.weight",
        bos_token_id = meta "tokenizer.ggml.bos_token_id", eos_token_id = meta "tokenizer.ggml.eos_token_id",
    }, where)
    local rot = get "rope.dimension_count"
    if rot and rot ~= c.head_dim then
        lc.fail("%s: rotary embedding on %d of %d dims of a head is not supported", where, rot, c.head_dim)
    end
    return c
end

--- Inverse frequencies of the rotary embedding, a table of head_dim / 2 numbers, after scaling.
function M.inv_freq(c)
    local d, s, out = c.head_dim, c.rope_scaling, {}
    for i = 0, d / 2 - 1 do
        local v = c.rope_theta ^ (-2 * i / d)
        if s and s.rope_type == "linear" then
            v = v / s.factor
        elseif s and s.rope_type == "llama3" then
            local ctx = s.original_max_position_embeddings
            local wavelength = 2 * math.pi / v
            if wavelength > ctx / s.low_freq_factor then
                v = v / s.factor
            elseif wavelength >= ctx / s.high_freq_factor then
                local part = (ctx / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                v = (1 - part) * v / s.factor + part * v
            end
        end
        out[i + 1] = v
    end
    if c.rope_factors then -- a GGUF's own divisors
        for i = 1, #out do out[i] = out[i] / c.rope_factors[i] end
    end
    return out
end

--- The config as Hugging Face's config.json spells it.
function M.to_json(c)
    local out = {}
    for k, v in pairs(c) do
        if k ~= "architecture" and k ~= "rope_factors" then out[k] = v end
    end
    out.architectures = { c.architecture }
    out.hidden_act = "silu"
    return out
end

return M
