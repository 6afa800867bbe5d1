-- models/families/qwen2.lua: Qwen2 and Qwen2.5: biases on q, k and v; a window on the upper layers where asked for.
return {
    model_type = "qwen2", architecture = "Qwen2ForCausalLM",
    defaults = { max_position_embeddings = 32768, num_key_value_heads = 32, sliding_window = 4096,
                 max_window_layers = 28 },
    bias = function() return { q_proj = true, k_proj = true, v_proj = true } end,
    window = function(c, layer) -- layer counts from 0
        if not c.use_sliding_window then return nil end
        local kind = c.layer_types and c.layer_types[layer + 1]
        if kind then return kind == "sliding_attention" and c.sliding_window end
        return layer >= c.max_window_layers and c.sliding_window
    end,
}
