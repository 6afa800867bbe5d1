-- models/config.lua: the one description of a decoder that the forward, the weights and the files go by, from a Hugging
-- Face config.json or from a GGUF's metadata. What a family adds to it (biases, norms of q and k, windows, defaults)
-- stands in models/families/NAME.lua; what this library cannot compute exactly is refused here, by name.
local lc = require "lolcats"
local files = require "lolcats.files"
local rope = require "lolcats.models.rope"

local M = {}

-- ---- families -------------------------------------------------------------------------------------------------------
local added = {}

--- Names of the families, sorted.
function M.families()
    local out, seen = {}, {}
    local function add(name)
        if name and not seen[name] then seen[name] = true; out[#out + 1] = name end
    end
    for _, path in ipairs(require("lolcats.program").files()) do
        add(path:match "^lua/lolcats/models/families/([%w_]+)%.lua$")
    end
    for name in pairs(added) do add(name) end
    table.sort(out)
    return out
end

--- Makes a family known that has no file here: {model_type =, architecture =, defaults = {}, qk_norm =,
--- bias = function(c) -> {projection = true}, window = function(c, layer from 0) -> keys or nil,
--- gguf = {interleaved = true}}.
function M.add_family(family)
    if type(family) ~= "table" or type(family.model_type) ~= "string" or type(family.architecture) ~= "string" then
        lc.fail "a family has model_type and architecture, as config.json names them"
    end
    added[family.model_type] = family
end

local function find_family(name)
    if type(name) ~= "string" or not name:match "^[%w_]+$" then return nil end
    if added[name] then return added[name] end
    local module = "lolcats.models.families." .. name
    if not package.loaded[module] and not require("lolcats.program").source(
        "lua/lolcats/models/families/" .. name .. ".lua") then return nil end
    return require(module)
end

local function refuse_family(name, where, what)
    if name:lower():match "moe" or name:lower():match "mixtral" then
        lc.fail("%s: %s '%s' is a mixture of experts, which is not supported", where, what, name)
    end
    lc.fail("%s: %s '%s' is not supported; %s are", where, what, name, table.concat(M.families(), ", "))
end

-- ---- checks ---------------------------------------------------------------------------------------------------------
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

-- What optional keys hold, where they hold anything; false stands for absent but where it is a choice.
local KINDS = {
    table = { "architectures", "layer_types", "quantization_config", "rope_scaling", "rope_parameters" },
    string = { "hidden_act", "model_type" },
    number = { "rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window",
               "max_window_layers", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor",
               "bos_token_id", "initializer_range" },
    boolean = { "attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings" },
}

local function check_kinds(c, where)
    for kind, keys in pairs(KINDS) do
        for _, key in ipairs(keys) do
            if c[key] == false and kind ~= "boolean" then c[key] = nil end
            if c[key] ~= nil and type(c[key]) ~= kind then
                lc.fail("%s: '%s' must be a %s, it is a %s", where, key, kind == "table" and "list or object" or kind,
                        type(c[key]))
            end
        end
    end
    local eos = c.eos_token_id
    for _, id in ipairs(type(eos) == "table" and eos or { eos or nil }) do
        if type(id) ~= "number" then lc.fail("%s: 'eos_token_id' must be an id or a list of ids", where) end
    end
    if eos == false then c.eos_token_id = nil end
end

-- Keys of other decoders that change what is computed: value under which they change nothing.
local NEUTRAL = { num_local_experts = 0, num_experts = 0, n_routed_experts = 0, rope_interleaved = false,
                  attn_logit_softcapping = false, final_logit_softcapping = false, query_pre_attn_scalar = false,
                  logits_scaling = 1, logit_scale = 1, residual_multiplier = 1, embedding_multiplier = 1,
                  attention_multiplier = false, no_rope_layers = false, use_qk_norm = false, use_mrope = false,
                  is_encoder_decoder = false }

local function refuse_what_is_unknown(c, where)
    for key, neutral in pairs(NEUTRAL) do
        if c[key] ~= nil and c[key] ~= neutral and c[key] ~= false then
            lc.fail("%s: %s = %s is not supported%s", where, key,
                    type(c[key]) == "table" and "[..]" or tostring(c[key]), key:match "experts" and " (a mixture of experts)" or "")
        end
    end
    if c.hidden_act and c.hidden_act ~= "silu" and c.hidden_act ~= "swish" then
        lc.fail("%s: hidden_act '%s' is not supported; silu is", where, tostring(c.hidden_act))
    end
    if c.quantization_config then
        lc.fail("%s: the weights are quantised (%s), which is not supported; GGUF is", where,
                tostring(c.quantization_config.quant_method or "unknown method"))
    end
end

-- The config's family. Old files write LLaMAForCausalLM, and some have only one of the two names.
local function family_of(c, where)
    local arch = c.architectures and c.architectures[1]
    local name = c.model_type or (type(arch) == "string" and arch:lower():match "^(.*)forcausallm$")
    if not name then lc.fail("%s: there is no model_type", where) end
    local family = find_family(name)
    if arch and (not family or tostring(arch):lower() ~= family.architecture:lower()) then
        if not family or not find_family(tostring(arch):lower():match "^(.*)forcausallm$") then
            refuse_family(tostring(arch), where, "architecture")
        end
        lc.fail("%s: architecture '%s' does not go with model_type '%s'", where, tostring(arch), name)
    end
    if not family then refuse_family(tostring(name), where, "model_type") end
    return family
end

-- The window of each layer (keys that a query sees, itself among them), where there is one: {[i] = keys}, i from 1.
local function windows_of(c, family, layers, where)
    local out = nil
    for i = 1, layers do
        local w = family.window and family.window(c, i - 1) or nil
        local kind = c.layer_types and c.layer_types[i]
        if kind ~= nil and kind ~= (w and "sliding_attention" or "full_attention") then
            lc.fail("%s: layer_types: '%s' for layer %d is not supported here", where, tostring(kind), i - 1)
        end
        if w then
            if type(w) ~= "number" or w < 1 or w ~= math.floor(w) then
                lc.fail("%s: 'sliding_window' must be a whole number above 0 or null, it is %s", where, tostring(w))
            end
            out = out or {}
            out[i] = w
        end
    end
    return out
end

-- Values that are absent (null is not absent) take the family's default.
local function with_defaults(raw, c, family)
    for key, v in pairs(family.defaults or {}) do
        if raw[key] == nil then c[key] = v end
    end
    if c.sliding_window == false then c.sliding_window = nil end
end

-- Keys that only a family knows, kept for config.json.
local KEPT = { "attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers", "sliding_window",
               "layer_types" }

--- Checks and completes a config given with Hugging Face's keys. where: what to name in errors. What is derived and no
--- key of the file: architecture, bias ({projection = true}), qk_norm, windows ({[layer from 1] = keys}), gguf.
function M.normalize(raw, where)
    local c = clean(raw)
    if type(c) ~= "table" then lc.fail("%s: expected a JSON object", where) end
    check_kinds(c, where)
    local family = family_of(c, where)
    with_defaults(raw, c, family)
    refuse_what_is_unknown(c, where)
    local h, hidden = need(c, "num_attention_heads", where), need(c, "hidden_size", where)
    if not c.head_dim and hidden % h ~= 0 then
        lc.fail("%s: hidden_size %d is not a multiple of num_attention_heads %d and there is no head_dim", where,
                hidden, h)
    end
    c.num_key_value_heads = c.num_key_value_heads or h
    c.head_dim = c.head_dim or hidden / h
    local out = {
        model_type = family.model_type, architecture = family.architecture, hidden_size = hidden,
        intermediate_size = need(c, "intermediate_size", where),
        num_hidden_layers = need(c, "num_hidden_layers", where), num_attention_heads = h,
        num_key_value_heads = need(c, "num_key_value_heads", where), head_dim = need(c, "head_dim", where),
        vocab_size = need(c, "vocab_size", where), rms_norm_eps = c.rms_norm_eps or 1e-6,
        max_position_embeddings = c.max_position_embeddings or 2048,
        tie_word_embeddings = c.tie_word_embeddings == true,
        bos_token_id = c.bos_token_id, eos_token_id = c.eos_token_id,
        qk_norm = family.qk_norm or false, bias = {}, gguf = family.gguf or {},
    }
    need(out, "max_position_embeddings", where)
    for name, on in pairs(family.bias and family.bias(c) or {}) do
        if on then out.bias[name] = true end
    end
    for _, key in ipairs(KEPT) do out[key] = c[key] end
    out.windows = windows_of(c, family, out.num_hidden_layers, where)
    rope.settle(out, c, where)
    if h % out.num_key_value_heads ~= 0 then
        lc.fail("%s: num_attention_heads %d is not a multiple of num_key_value_heads %d", where, h,
                out.num_key_value_heads)
    end
    if out.head_dim % 2 ~= 0 then
        lc.fail("%s: head_dim %d is odd; rotary embedding needs pairs", where, out.head_dim)
    end
    return out
end

-- ---- GGUF -----------------------------------------------------------------------------------------------------------
local function gguf_scaling(get)
    local kind, factor = get "rope.scaling.type", get "rope.scaling.factor" or get "rope.scale_linear"
    if not kind and factor and factor ~= 1 then kind = "linear" end
    if not kind or kind == "none" then return nil end
    return { rope_type = kind, factor = factor,
             original_max_position_embeddings = get "rope.scaling.original_context_length" }
end

-- Biases of a file show in its tensors only. A llama with biases on q, k and v alone is what config.json calls qwen2.
local function gguf_biases(c, has)
    c.attention_bias, c.mlp_bias = has "blk.0.attn_q.bias", has "blk.0.ffn_up.bias"
    if c.model_type == "llama" and c.attention_bias and not has "blk.0.attn_output.bias" then c.model_type = "qwen2" end
end

--- From a GGUF's metadata. meta(key) gives a value or nil; has(name) says whether a tensor is there; shape(name) its
--- shape.
function M.from_gguf(meta, has, shape, where)
    local arch = meta "general.architecture"
    if not find_family(arch) then refuse_family(tostring(arch), where, "GGUF architecture") end
    local function get(key)
        local v = meta(arch .. "." .. key)
        if v ~= nil and type(v) ~= (key == "rope.scaling.type" and "string" or "number") then
            lc.fail("%s: the metadata '%s.%s' is a %s, which is not supported", where, arch, key, type(v))
        end
        return v
    end
    if (get "expert_count" or 0) > 0 then lc.fail("%s: a mixture of experts is not supported", where) end
    local embd, heads = shape "token_embd.weight", get "attention.head_count"
    local raw = {
        model_type = arch, hidden_size = get "embedding_length", intermediate_size = get "feed_forward_length",
        num_hidden_layers = get "block_count", num_attention_heads = heads,
        num_key_value_heads = get "attention.head_count_kv" or heads,
        head_dim = get "attention.key_length" or get "rope.dimension_count" or false,
        vocab_size = embd and embd[1] or get "vocab_size", rms_norm_eps = get "attention.layer_norm_rms_epsilon",
        rope_theta = get "rope.freq_base", rope_scaling = gguf_scaling(get),
        max_position_embeddings = get "context_length", sliding_window = get "attention.sliding_window" or files.null,
        tie_word_embeddings = not has "output.weight", logit_scale = get "logit_scale",
        bos_token_id = meta "tokenizer.ggml.bos_token_id", eos_token_id = meta "tokenizer.ggml.eos_token_id",
    }
    gguf_biases(raw, has)
    local c = M.normalize(raw, where)
    c.gguf = find_family(arch).gguf or {}
    local rot, value = get "rope.dimension_count", get "attention.value_length"
    if rot and rot ~= c.head_dim then
        lc.fail("%s: rotary embedding on %d of %d dims of a head is not supported", where, rot, c.head_dim)
    end
    if value and value ~= c.head_dim then
        lc.fail("%s: values of %d dims beside keys of %d are not supported", where, value, c.head_dim)
    end
    return c
end

M.inv_freq = rope.inv_freq

-- ---- config.json ----------------------------------------------------------------------------------------------------
local DERIVED = { architecture = true, qk_norm = true, bias = true, gguf = true, windows = true }

--- The config as Hugging Face's config.json spells it.
function M.to_json(c)
    local out = {}
    for k, v in pairs(c) do
        if not DERIVED[k] then out[k] = v end
    end
    out.architectures = { c.architecture }
    out.hidden_act = "silu"
    if c.sliding_window == nil and c.model_type ~= "llama" then out.sliding_window = files.null end
    return out
end

return M
