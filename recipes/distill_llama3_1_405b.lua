-- distill_llama3_1_405b.lua: linearize Llama 3.1 405B on one machine, 9 layers at a time, with the paper's settings;
-- then finetune the whole. --tiny runs all of it on a small random model.
--   lolcats distill_llama3_1_405b --model DIR --data redpajama.jsonl
--   lolcats distill_llama3_1_405b --tiny
local lc = require "lolcats"
local tiny = require "lolcats.tiny"

lc.recipe "distill_blocks" (tiny.apply({
    doc = "Linearize Llama 3.1 405B in blocks of 9 layers: attention transfer, then LoRA, a block at a time.",
    model = "meta-llama/Meta-Llama-3.1-405B", data = "data/long-llm/redpajama/train.json", out = "runs/llama3_1_405b",
    layers = 9, seq = 1024,
    hold_out = 500, dtype = "bf16", window = 64, feature_dim = 64, epochs = 1, accumulate = 8, mse = 1000, xent = 1,
    transfer_lr = 1e-2,
    lora_lr = 1e-4, schedule = "plateau", clip = 1, rank = 4, alpha = 8, tiny_shape = { num_hidden_layers = 6 },
}, "llama3_1", { layers = 2, feature_dim = 8, data = "OUT/records.json", records = 60, hold_out = 8,
                 transfer_steps = 6, lora_steps = 6, eval_every = 3, eval_rows = 4 }))
