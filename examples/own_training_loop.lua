-- own_training_loop.lua: training without lc.run: a small network learns a curve.
local lc = require "lolcats"
local args = lc.args { "Fit sin(3x) with a small network.", { "steps", 400, "updates" }, { "lr", 0.02, "learning rate" } }

lc.manual_seed(0)
local w1, b1 = lc.param(lc.randn(32, 1)), lc.param(lc.randn(32))
local w2, b2 = lc.param(lc.randn(1, 32) * 0.2), lc.param(lc.zeros(1))
local function model(x) return lc.linear(lc.linear(x, w1, b1):tanh(), w2, b2) end

local optim = lc.adamw({ w1, b1, w2, b2 }, { lr = args.lr })
local schedule = lc.cosine { warmup = 10, total = args.steps }:start(args.lr)
for step = 1, args.steps do
    local value = lc.scope(function() -- everything made inside is given back at its end
        local x = lc.rand(64, 1) * 4 - 2
        local loss = lc.mse_loss(model(x), (x * 3):sin())
        loss:backward()
        return loss:item()
    end)
    optim:clip(1)
    optim:step(schedule:rate(step - 1))
    optim:zero_grad()
    if step % 100 == 0 or step == args.steps then print(("step %d  loss %.5f"):format(step, value)) end
end
