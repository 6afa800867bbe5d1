-- distill_mistral.lua: linearize Mistral-7B with the paper's settings; --tiny runs all of it on a small random model.
--   lolcats distill_mistral --model DIR --data alpaca_data_cleaned.json
--   lolcats distill_mistral --tiny
local lc = require "lolcats"
local tiny = require "lolcats.tiny"

local defaults = {
    doc = "Linearize Mistral-7B with the paper's settings: attention transfer, then LoRA.",
    model = "mistralai/Mistral-7B-v0.1", data = "yahma/alpaca-cleaned", out = "runs/mistral", seq = 1024, hold_out = 200, eval_rows = 32,
    dtype = "bf16", epochs = 2, accumulate = 8, transfer_lr = 1e-2, lora_lr = 1e-4, schedule = "plateau", eval_every = 100, rank = 8, alpha = 16,
    more = { { "tiny", false, "a small random model of the same shape, written to OUT/model, and little text: to see it run" } },
}
if tiny.wanted() then
    for k, v in pairs { model = "OUT/model", data = "OUT/text.txt", out = "runs/mistral_tiny", seq = 128, window = 16, hold_out = 0.05,
                        eval_rows = 8, transfer_steps = 20, lora_steps = 20, accumulate = 2, eval_every = 10, sample = 16 } do
        defaults[k] = v
    end
    function defaults.prepare(args) args.model, args.data = tiny.prepare(args.out, args.model, args.data, "mistral", args.seed) end
end

lc.recipe "distill" (defaults)
