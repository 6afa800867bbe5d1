-- models/families/qwen3.lua: Qwen3: RMSNorm over each head of q and k before the rotation; head_dim of its own.
return {
    model_type = "qwen3", architecture = "Qwen3ForCausalLM",
    defaults = { max_position_embeddings = 32768, num_key_value_heads = 32, head_dim = 128, sliding_window = 4096,
                 max_window_layers = 28 },
    qk_norm = true,
    bias = function(c)
        return { q_proj = c.attention_bias, k_proj = c.attention_bias, v_proj = c.attention_bias,
                 o_proj = c.attention_bias }
    end,
    window = function(c, layer) -- layer counts from 0
        if not c.use_sliding_window then return nil end
        local kind = c.layer_types and c.layer_types[layer + 1]
        if kind then return kind == "sliding_attention" and c.sliding_window end
        return layer >= c.max_window_layers and c.sliding_window
    end,
}
