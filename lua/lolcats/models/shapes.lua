-- models/shapes.lua: shapes of well-known decoders, for models with random weights: lc.load "random:mistral-7b". Speed
-- and memory do not depend on what the weights are.
local lc = require "lolcats"

local M = {}

local function llama(hidden, ffn, layers, heads, groups, vocab, more)
    local c = { model_type = "llama", hidden_size = hidden, intermediate_size = ffn, num_hidden_layers = layers,
                num_attention_heads = heads, num_key_value_heads = groups, vocab_size = vocab, rms_norm_eps = 1e-5,
                rope_theta = 10000, tie_word_embeddings = false, max_position_embeddings = 32768 }
    for k, v in pairs(more or {}) do c[k] = v end
    return c
end

local SHAPES = {
    ["mistral-7b"] = llama(4096, 14336, 32, 32, 8, 32000, { model_type = "mistral", sliding_window = false }),
    ["llama-2-7b"] = llama(4096, 11008, 32, 32, 32, 32000),
    ["llama-3-8b"] = llama(4096, 14336, 32, 32, 8, 128256, { rope_theta = 500000 }),
    ["llama-3.2-1b"] = llama(2048, 8192, 16, 32, 8, 128256, { rope_theta = 500000, tie_word_embeddings = true }),
    ["tinyllama-1.1b"] = llama(2048, 5632, 22, 32, 4, 32000),
    ["smollm2-135m"] = llama(576, 1536, 30, 9, 3, 49152, { rope_theta = 100000, tie_word_embeddings = true }),
    ["tiny"] = llama(64, 176, 3, 4, 2, 256),
}

--- Names of the shapes, sorted.
function M.names()
    local out = {}
    for k in pairs(SHAPES) do out[#out + 1] = k end
    table.sort(out)
    return out
end

--- The config of a shape, in Hugging Face's keys. "mistral-7b/4" has 4 layers instead of all.
function M.find(text)
    local name, layers = text:match "^(.-)/(%d+)$"
    local c = SHAPES[name or text]
    if not c then lc.fail("random:%s: there is no such shape; there are %s", text, table.concat(M.names(), ", ")) end
    local out = {}
    for k, v in pairs(c) do out[k] = v end
    if layers then
        if tonumber(layers) < 1 then lc.fail("random:%s: a model has at least 1 layer", text) end
        out.num_hidden_layers = tonumber(layers)
    end
    return out
end

return M
