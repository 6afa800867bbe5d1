-- device_training.lua: 50 steps of attention transfer and 50 of LoRA on a small trained model, in bf16 on a device and in float32 on the
-- CPU: the losses must stay within a hundredth of each other. Then generation from both.
--   lolcats tests/device_training.lua [--device cuda:0] [--model FOLDER] [--steps 50]
local t = dofile "tests/lua/harness.lua"
local lc = require "lolcats"
local files = lc.files

local data = os.getenv "LOLCATS_TEST_DATA" or "../shared"
local args = lc.args {
    "Compare training on a device with training on the CPU.",
    { "device", os.getenv "LOLCATS_DEVICE" or "cuda:0", "where" },
    { "dtype", "bf16", "of weights and activations there" },
    { "model", data .. "/assets/models/TinyStories-656K", "a small trained model with a tokenizer" },
    { "text", data .. "/assets/datasets/tinystories_sample_2MB.txt", "text to train on" },
    { "steps", 50, "updates a stage" }, { "seq", 256, "tokens a row" },
}
if not files.exists(args.model) then
    io.stdout:write(("skipped: there is no model %s\n"):format(args.model))
    os.exit(77)
end
if not lc.has_device(args.device) then
    io.stdout:write(("skipped: no device %s: %s\n"):format(args.device, lc.plugin_why(args.device:match "^%a+")))
    os.exit(77)
end

local function train(device, dtype)
    lc.manual_seed(5)
    local model = lc.load(args.model, { device = device, dtype = dtype }):freeze()
    local ids = model.tokenizer:encode(files.read(args.text):sub(1, 200000), { special = false, parse = false })
    local rows = math.floor(#ids / args.seq)
    local student = lc.linearize(model, { map = "hedgehog" })
    local function row(i)
        local out = {}
        for k = 1, args.seq do out[k] = ids[(i % rows) * args.seq + k] end
        return { out }
    end
    local losses = {}
    local optim = lc.adamw(student:trainable(), { lr = 1e-2 })
    for i = 1, args.steps do
        optim:zero_grad()
        losses[#losses + 1] = (student:transfer(row(i)))
        optim:step()
    end
    student:use_linear():add_lora {}
    for k, p in ipairs(require("lolcats.lora").parameters(student)) do -- one start on both
        if p.name:match "lora_A" then
            local n = p.tensor:numel()
            local start = ((lc.arange(n, { dtype = "f32" }) * 0.37 + k):sin() * 0.05):reshape(p.tensor.shape)
            lc.no_grad(function() p.tensor:copy_(start:to(p.tensor.device)) end)
        end
    end
    optim = lc.adamw(student:trainable(), { lr = 1e-4 })
    for i = 1, args.steps do
        optim:zero_grad()
        losses[#losses + 1] = lc.scope(function()
            local loss = student:loss(row(i))
            loss:backward()
            return loss:item()
        end)
        optim:step()
    end
    local _, out = student:generate(row(0)[1], { max_new = 40 })
    return losses, out
end

local want, words = train("cpu", "f32")
local got, same = train(args.device, args.dtype)
for stage, name in ipairs { "attention transfer", "LoRA" } do
    t.test(("%s: %d steps follow the CPU's"):format(name, args.steps), function()
        local worst, at = 0, 0
        for i = (stage - 1) * args.steps + 1, stage * args.steps do
            local d = math.abs(got[i] - want[i]) / math.abs(want[i])
            if not (d <= worst) then worst, at = d, i end
        end
        io.stdout:write(("%s: first %.6g and %.6g, last %.6g and %.6g; largest difference %.3f %% at step %d\n"):format(name,
            want[(stage - 1) * args.steps + 1], got[(stage - 1) * args.steps + 1], want[stage * args.steps], got[stage * args.steps],
            100 * worst, at))
        t.ok(worst <= 0.01, ("differs by %.3f %% at step %d: %.6g, on the CPU %.6g"):format(100 * worst, at, got[at] or 0, want[at] or 0))
    end)
end
t.test("generation", function()
    local alike = 0
    for i = 1, #words do if words[i] == same[i] then alike = alike + 1 end end
    io.stdout:write(("greedy tokens alike: %d of %d\n"):format(alike, #words))
    t.ok(#same == #words, "as many tokens")
end)
t.finish()
