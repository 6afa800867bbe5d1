-- trajectory.lua: both stages of the method on a real model, for tests/peers/trajectory.py to repeat in PyTorch: the weights as a
-- Hugging Face folder, the rows that each update saw, the adapters' start as PEFT has it, the losses, and what came out.
--   lolcats tests/peers/trajectory.lua FOLDER [--model smollm2] [--data FILE.json] [--steps 50]
local lc = require "lolcats"
local files = lc.files

local args = lc.args {
    "Train both stages and write all that another program needs to do the same.",
    { "folder", lc.required, "folder for the files", positional = true },
    { "model", "smollm2", "a folder, a file, or a name" },
    { "data", "", "records; without it Alpaca's in LOLCATS_TEST_DATA, else chitchat" },
    { "steps", 50, "updates a stage", min = 1 },
    { "accumulate", 1, "rows an update", min = 1 },
    { "seq", 512, "tokens a row", min = 2 },
    { "window", 64, "tokens that keep softmax attention", min = 1 },
    { "kind", "terrace", "how the window moves", { "terrace", "sliding" } },
    { "transfer_lr", 1e-2, "learning rate of attention transfer" },
    { "lora_lr", 1e-4, "learning rate of LoRA" },
    { "rank", 8, "rank of LoRA", min = 1 },
    { "alpha", 16, "scale of LoRA is alpha / rank" },
    { "seed", 0, "order of rows and start of LoRA" },
    { "dtype", "f32", "of weights and arithmetic", { "f32", "f64" } },
}
local folder = args.folder
if args.seq <= 2 * args.window then
    lc.fail("rows of %d tokens lie within two windows of %d: there is no linear part to learn", args.seq, args.window)
end

local function source()
    if args.data ~= "" then return args.data end
    local alpaca = (os.getenv "LOLCATS_TEST_DATA" or "../shared") .. "/assets/datasets/alpaca-cleaned/alpaca_data_cleaned.first5000.json"
    return files.exists(alpaca) and alpaca or "chitchat"
end

lc.manual_seed(args.seed)
local loaded, teacher = pcall(lc.load, args.model, { dtype = args.dtype })
if not loaded then
    print("skipped: " .. tostring(teacher)) -- as where there is no package index
    os.exit(77)
end
teacher:freeze()
files.make_dirs(folder)
teacher:save_weights(folder .. "/model")
local name = source()
local data = lc.data(name, { model = teacher, seq = args.seq, hold_out = 200, limit = 5000 })
local student = lc.linearize(teacher, { map = "hedgehog", window = args.window, kind = args.kind })

local function save(file, params)
    local out = {}
    for _, p in ipairs(params) do out[p.name] = p.tensor:detach() end
    files.save_tensors(folder .. "/" .. file, out)
end

-- One stage; step(batch, run) makes gradients and logs the loss. Returns the rows in the order in which it saw them.
local function stage(what, lr, step)
    local run = lc.run {
        name = what, out = folder, data = data, params = student:trainable(), model = student, fresh = true, quiet = true,
        optim = lc.adamw { lr = lr, weight_decay = 0 }, schedule = "constant", max_steps = args.steps, accumulate = args.accumulate,
        seed = args.seed,
    }
    local ids, labels = {}, {}
    for batch in run:steps() do
        ids[#ids + 1], labels[#labels + 1] = batch.ids:totable()[1], batch.labels:totable()[1]
        step(batch, run)
    end
    local i32 = { dtype = "i32" }
    files.save_tensors(folder .. "/" .. what .. "_rows.safetensors", { ids = lc.tensor(ids, i32), labels = lc.tensor(labels, i32) })
    print(("%s: %d updates, %.2f s each"):format(what, args.steps, run:summary().seconds / args.steps))
end

save("maps_start.safetensors", student:map_params())
stage("transfer", args.transfer_lr, function(batch, run)
    run:log { loss = student:transfer(batch.ids, { scale = 1 / run.accumulate }) * run.accumulate }
end)
save("maps_end.safetensors", student:map_params())

student:use_linear():add_lora { rank = args.rank, alpha = args.alpha }
student:save_adapter(folder .. "/adapter_start")
stage("lora", args.lora_lr, function(batch, run) run:learn(student, batch.ids, batch.labels) end)
student:save_adapter(folder .. "/adapter_end")

files.write_json(folder .. "/settings.json", {
    data = files.basename(name), steps = args.steps, accumulate = args.accumulate, seq = args.seq, window = args.window, kind = args.kind,
    transfer_lr = args.transfer_lr, lora_lr = args.lora_lr, dtype = args.dtype,
})
