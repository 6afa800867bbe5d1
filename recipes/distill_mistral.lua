-- distill_mistral.lua: linearize Mistral-7B with the paper's settings; --tiny runs all of it on a small random model.
--   lolcats distill_mistral --model DIR --data alpaca_data_cleaned.json
--   lolcats distill_mistral --tiny
local lc = require "lolcats"
local tiny = require "lolcats.tiny"

lc.recipe "distill" (tiny.apply({
    doc = "Linearize Mistral-7B with the paper's settings: attention transfer, then LoRA.",
    model = "mistralai/Mistral-7B-v0.1", data = "yahma/alpaca-cleaned", out = "runs/mistral", seq = 1024,
    hold_out = 200, eval_rows = 32, dtype = "bf16", epochs = 2, accumulate = 8, transfer_lr = 1e-2, lora_lr = 1e-4,
    schedule = "plateau", eval_every = 100, rank = 8, alpha = 16,
}, "mistral", { dtype = "bf16" }))
