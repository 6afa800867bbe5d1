-- distill_llama3_1_70b.lua: linearize Llama 3.1 70B on one machine, 5 layers at a time, with the paper's settings; then
-- finetune the whole. --tiny runs all of it on a small random model.
--   lolcats distill_llama3_1_70b --model DIR --data redpajama.jsonl
--   lolcats distill_llama3_1_70b --tiny
local lc = require "lolcats"
local tiny = require "lolcats.tiny"

lc.recipe "distill_blocks" (tiny.apply({
    doc = "Linearize Llama 3.1 70B in blocks of 5 layers: attention transfer, then LoRA, a block at a time.",
    model = "meta-llama/Meta-Llama-3.1-70B", data = "data/long-llm/redpajama/train.json", out = "runs/llama3_1_70b",
    layers = 5, seq = 2048,
    hold_out = 500, dtype = "bf16", window = 64, feature_dim = 64, epochs = 1, accumulate = 8, mse = 1000, xent = 0,
    transfer_lr = 1e-2,
    lora_lr = 1e-4, schedule = "plateau", clip = 1, rank = 8, alpha = 16, tiny_shape = { num_hidden_layers = 5 },
}, "llama3_1", { layers = 2, feature_dim = 8, data = "OUT/records.json", records = 60, hold_out = 8,
                 transfer_steps = 6, lora_steps = 6, eval_every = 3, eval_rows = 4 }))
