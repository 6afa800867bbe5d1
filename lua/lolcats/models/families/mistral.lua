-- models/families/mistral.lua: Mistral: Llama with a window over the keys, 4,096 where the config does not say.
return {
    model_type = "mistral", architecture = "MistralForCausalLM",
    defaults = { sliding_window = 4096, num_key_value_heads = 8, max_position_embeddings = 131072 },
    window = function(c) return c.sliding_window end,
}
