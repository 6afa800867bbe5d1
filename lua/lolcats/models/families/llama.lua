-- models/families/llama.lua: Llama 1 to 3.2, TinyLlama, SmolLM2 and what else calls itself llama.
return {
    model_type = "llama", architecture = "LlamaForCausalLM",
    gguf = { interleaved = true }, -- its GGUF files keep rows of q and k in pairs
    bias = function(c)
        return { q_proj = c.attention_bias, k_proj = c.attention_bias, v_proj = c.attention_bias,
                 o_proj = c.attention_bias, gate_proj = c.mlp_bias, up_proj = c.mlp_bias, down_proj = c.mlp_bias }
    end,
}
