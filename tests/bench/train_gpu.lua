-- train_gpu.lua: attention transfer and LoRA steps on a GPU: milliseconds (the mean of a loop of at least `seconds`), how long the
-- host took to send a step, peak memory, and the share of the GEMM rate, measured in the same run on the model's own shapes.
--   lolcats tests/bench/train_gpu.lua [--model random:mistral-7b] [--device cuda:0] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time an attention-transfer step and a LoRA step on a GPU.",
    { "model", "random:mistral-7b", "a model, or random:SHAPE" },
    { "device", "cuda:0", "where" },
    { "dtype", "bf16", "of weights and activations" },
    { "seq", 1024, "tokens a row", min = 16 }, { "batch", 1, "rows a step", min = 1 },
    { "seconds", 1.5, "a timed loop lasts at least so long" },
    { "stage", "both", "what to time", { "both", "transfer", "lora" } },
    { "rank", 8, "rank of LoRA" },
    { "accumulate", 8, "micro-steps an optimizer step" },
    { "eager", false, "no step is recorded as a graph" },
    { "profile", false, "also the host's time of each op" },
    { "json", false, "one JSON object on stdout" },
}
local device = args.device
local began = lc.now()
lc.manual_seed(1)
local model = lc.load(args.model, { dtype = args.dtype, device = device }):freeze()
lc.sync(device)
local loaded = lc.now()
local c, M = model.config, args.seq * args.batch

local function median(list)
    table.sort(list)
    return list[math.floor((#list + 1) / 2)]
end

-- FLOP/s of the layers' products, sent back to back.
local function gemm_rate()
    return lc.no_grad(lc.scope, function()
        local work, n = 0, 0
        local x = { lc.randn({ M, c.hidden_size }, { dtype = args.dtype, device = device }),
                    lc.randn({ M, c.intermediate_size }, { dtype = args.dtype, device = device }) }
        local function layer(l)
            work = 0
            for _, w in ipairs { l.qkv, l.proj.o_proj.weight, l.gate_up, l.proj.down_proj.weight } do
                local input = w:size(2) == c.hidden_size and x[1] or w:size(2) == c.intermediate_size and x[2]
                if input then
                    lc.linear(input, w):drop()
                    work = work + 2 * M * w:numel()
                end
            end
        end
        for i = 1, 4 do layer(model.layers[(i - 1) % #model.layers + 1]) end
        lc.sync(device)
        local t0 = lc.now()
        repeat
            for i = 1, #model.layers do layer(model.layers[i]) end
            n = n + #model.layers
            lc.sync(device)
        until lc.now() - t0 > args.seconds
        return work * n / (lc.now() - t0)
    end)
end

local ids = {}
for b = 1, args.batch do
    ids[b] = {}
    local draw = lc.rand({ args.seq }, { device = "cpu" }):totable()
    for i = 1, args.seq do ids[b][i] = math.floor(draw[i] * c.vocab_size) % c.vocab_size end
end
ids = lc.tensor(ids, { dtype = "i32", device = device })
local labels = ids:cpu():totable()

local result = { model = args.model, seq = args.seq, batch = args.batch, dtype = args.dtype, device = device, version = lc.version,
                 describe = lc.devices()[2] and lc.devices()[2].describe, load_seconds = loaded - began }

local student
local function time(name, step, optim)
    collectgarbage() -- what the stage before trained with
    collectgarbage()
    local first = lc.now()
    local loss = lc.scope(step)
    optim:step()
    lc.sync(device)
    result.first_step_seconds = result.first_step_seconds or lc.now() - first
    for _ = 1, 3 do lc.scope(step) end -- the third one is recorded
    lc.sync(device)
    lc.reset_peak(device)
    local seconds, sent, t0, micro = {}, {}, lc.now(), 1
    repeat
        local t1 = lc.now()
        loss = lc.scope(step)
        micro = micro + 1
        sent[#sent + 1] = lc.now() - t1
        if micro % args.accumulate == 0 then
            local _ = loss:item() -- as a trainer reads its losses, before an update
            optim:step()
            optim:zero_grad()
        end
        seconds[#seconds + 1] = lc.now() - t1
        collectgarbage "step"
    until lc.now() - t0 > args.seconds and #seconds > 5
    lc.sync(device)
    local whole = (lc.now() - t0) / #seconds
    local r = { ms = whole * 1e3, sent_ms = median(sent) * 1e3, tok_s = M / whole, peak_gib = lc.memory("peak", device) / 2 ^ 30,
                loss = type(loss) == "number" and loss or loss:item() }
    local at = lc.now()
    lc.scope(step)
    r.host_ms = (lc.now() - at) * 1e3
    if args.profile then
        student.records = false
        io.stderr:write(name, "\n", (lc.profile(lc.scope, step)), "\n")
        student.records = not args.eager
    end
    result[name] = r
end

result.gemm_tflops = gemm_rate() / 1e12
local weights = 0
for _, p in ipairs(model:params()) do weights = weights + p.tensor:nbytes() end
result.weights_gib = weights / 2 ^ 30
student = lc.linearize(model, { map = "hedgehog" })
if args.eager then student.records = false end
if args.stage ~= "lora" then
    local optim = lc.adamw(student:trainable(), { lr = 1e-2 })
    time("transfer", function() return student:transfer(ids, { wait = false }) end, optim)
end
if args.stage ~= "transfer" then
    student:use_linear():add_lora { rank = args.rank, alpha = 2 * args.rank }
    local optim = lc.adamw(student:trainable(), { lr = 1e-4 })
    time("lora", function() return student:learn(ids, labels, 1, false) end, optim)
end
-- what the products of a step must take at the rate measured
local H, I, d = c.hidden_size, c.intermediate_size, c.head_dim
local qkv = H * (c.num_attention_heads + 2 * c.num_key_value_heads) * d
local rest, L = c.num_attention_heads * d * H + 3 * H * I, #model.layers
local floor = { transfer = (L * qkv + (L - 1) * rest) * 2 * M, lora = ((L * (qkv + rest)) * 2 - qkv + 2 * c.vocab_size * H) * 2 * M }
for name, work in pairs(floor) do
    if result[name] then
        result[name].gemm_floor_ms = work / (result.gemm_tflops * 1e12) * 1e3
        result[name].share = result[name].gemm_floor_ms / result[name].ms
    end
end

if args.json then print(lc.files.to_json(result)) else
    print(("%s on %s (%s), %d x %d tokens; GEMM %.0f TFLOP/s; loaded in %.1f s, first step %.2f s; weights %.2f GiB"):format(args.model, device,
        result.describe or "", args.batch, args.seq, result.gemm_tflops, result.load_seconds, result.first_step_seconds, result.weights_gib))
    local rows = {}
    for _, name in ipairs { "transfer", "lora" } do
        local r = result[name]
        if r then
            rows[#rows + 1] = { name, ("%.2f"):format(r.ms), ("%.2f"):format(r.gemm_floor_ms), ("%.0f %%"):format(100 * r.share),
                                ("%.0f"):format(r.tok_s), ("%.2f"):format(r.peak_gib), ("%.5g"):format(r.loss) }
        end
    end
    print(log.table(rows, { "step", "ms", "of it GEMM", "share", "tokens/s", "peak GiB", "loss" }))
end
