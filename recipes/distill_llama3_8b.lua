-- distill_llama3_8b.lua: linearize Llama 3 8B with the paper's settings; --tiny runs all of it on a small random model.
--   lolcats distill_llama3_8b --model DIR --data alpaca_data_cleaned.json
--   lolcats distill_llama3_8b --tiny
local lc = require "lolcats"
local tiny = require "lolcats.tiny"

lc.recipe "distill" (tiny.apply({
    doc = "Linearize Llama 3 8B with the paper's settings: attention transfer, then LoRA.",
    model = "meta-llama/Meta-Llama-3-8B", data = "yahma/alpaca-cleaned", out = "runs/llama3_8b", seq = 1024,
    hold_out = 200,
    eval_rows = 32, dtype = "bf16", window = 64, feature_dim = 64, epochs = 2, accumulate = 8, transfer_lr = 1e-2,
    lora_lr = 1e-4,
    schedule = "plateau", clip = 1, eval_every = 100, rank = 8, alpha = 16,
}, "llama3", { feature_dim = 8 }))
