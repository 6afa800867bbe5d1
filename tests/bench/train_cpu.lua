-- train_cpu.lua: what an attention-transfer step and a LoRA step cost here: seconds (median after a warm-up), tokens/s, peak memory,
-- and the share of the GEMM rate, measured in the same run on the model's own shapes, over counted FLOPs.
--   lolcats tests/bench/train_cpu.lua [--model M] [--seq 1024] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time an attention-transfer step and a LoRA step.",
    { "model", "smollm2", "folder, file, Hub id in the cache, or smollm2" },
    { "seq", 1024, "tokens a row", min = 16 },
    { "batch", 1, "rows a step", min = 1 },
    { "steps", 5, "timed steps", min = 1 },
    { "stage", "both", "what to time", { "both", "transfer", "lora" } },
    { "window", 64, "softmax window" },
    { "rank", 8, "rank of LoRA" },
    { "dtype", "f32", "dtype of the frozen weights" },
    { "threads", 0, "threads; 0: as the program chooses" },
    { "profile", false, "also print what each op takes" },
    { "json", false, "one JSON object on stdout" },
}
if args.threads > 0 then lc.threads(args.threads) end

local model = lc.load(args.model, { dtype = args.dtype }):freeze()
local c = model.config
local L, T, B = #model.layers, args.seq, args.batch
local M = T * B
local H, G, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
local hidden, inner, vocab = c.hidden_size, c.intermediate_size, c.vocab_size

local function median(list)
    table.sort(list)
    local n = #list
    return n % 2 == 1 and list[(n + 1) / 2] or (list[n / 2] + list[n / 2 + 1]) / 2
end

-- ---- counted FLOPs: a multiplication and an addition are two; only what the method needs, in its cheapest known form ------------------
local student = lc.linearize(model, { map = "hedgehog", window = args.window })
local f = student.layers[1].student.fq.layer:size(3)
local F = 2 * f
local QKV, O, MLP = hidden * (H + 2 * G) * d, H * d * hidden, 3 * hidden * inner
local gemm = function(size) return 2 * M * size end
local keys = args.window * 1.5 -- of a terrace's softmax, on average; fewer in the first two blocks
local window = 2 * M * H * d * math.min(keys, T / 2) -- one product of queries and window
local linear = 2 * M * H * F * d                     -- one product of features and state
local map = 2 * M * H * d * f                        -- one side's features
local flops = {
    transfer = {
        trunk = L * gemm(QKV) + (L - 1) * gemm(O + MLP), -- nothing reads what follows the last layer's attention
        teacher = L * 2 * M * T * H * d,                 -- causal: half of the square, twice
        -- forward: window 2, state and reading 2, maps 2; backward: dS, d fq, d fk, S again; maps again and their dW
        student = L * (2 * window + 2 * linear + 2 * map + 4 * linear + 4 * map),
    },
    lora = {
        trunk = L * gemm(QKV + O + MLP) * 2 - gemm(QKV), -- forward and dX; no dX before the first adapters
        adapters = 3 * L * 2 * M * args.rank * ((hidden + H * d) * 2 + (hidden + G * d) * 2),
        student = L * (2 * window + 2 * linear + 2 * map + 5 * window + 5 * linear + 4 * map),
        head = 2 * 2 * B * (T - 1) * vocab * hidden,
    },
}
local function total(t)
    local sum = 0
    for _, v in pairs(t) do sum = sum + v end
    return sum
end

-- ---- the GEMM rate ---------------------------------------------------------------------------------------------------------------------
-- Products of M rows with the model's own weights, in the mix of a layer; medians, as for the steps.
local function gemm_rate()
    local names, layers, times = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" }, math.min(L, 8), {}
    lc.no_grad(lc.scope, function()
        local inputs = {}
        for _ = 1, 5 do
            for i = 1, layers do
                for _, name in ipairs(names) do
                    local w = model.layers[i].proj[name].weight
                    local inp = w:size(2)
                    inputs[inp] = inputs[inp] or lc.randn(M, inp, { dtype = model.dtype })
                    local t0 = lc.now()
                    lc.linear(inputs[inp], w):drop()
                    times[name] = times[name] or {}
                    table.insert(times[name], lc.now() - t0)
                end
            end
        end
    end)
    local seconds, work = 0, 0
    for _, name in ipairs(names) do
        seconds, work = seconds + median(times[name]), work + 2 * M * model.layers[1].proj[name].weight:numel()
    end
    return work / seconds
end

lc.manual_seed(1)
local ids = {}
for b = 1, B do
    ids[b] = {}
    local draw = lc.rand(T):totable()
    for i = 1, T do ids[b][i] = math.floor(draw[i] * vocab) % vocab end
end
ids = lc.keep(lc.tensor(ids, { dtype = "i32" }))

local result = { model = args.model, seq = T, batch = B, dtype = args.dtype, threads = lc.threads(), isa = lc.cpu_isa(), gemm = lc.cpu_gemm(),
                 version = lc.version }

local function time(name, step, optim)
    local seconds, loss, before = {}, nil, gemm_rate()
    for i = 0, args.steps do
        local t0 = lc.now()
        loss = lc.scope(step)
        optim:step()
        optim:zero_grad()
        collectgarbage()
        if i > 0 then seconds[i] = lc.now() - t0 end
    end
    local report
    if args.profile then report = lc.profile(lc.scope, step) end
    local best = math.huge
    for _, s in ipairs(seconds) do best = math.min(best, s) end
    local s = median(seconds)
    local rate = (before + gemm_rate()) / 2
    local count = total(flops[name])
    result[name] = { seconds = s, best_seconds = best, tok_s = M / s, gflop = count / 1e9, gflop_parts = {}, gflops = count / s / 1e9,
                     gemm_gflops = rate / 1e9, gemm_share = count / s / rate, peak_rss_mb = lc.peak_rss() / 2 ^ 20, loss = loss }
    for k, v in pairs(flops[name]) do result[name].gflop_parts[k] = v / 1e9 end
    if report then io.stderr:write(name, "\n", report, "\n") end
end

gemm_rate() -- packs what is packed once, wakes the threads
if args.stage ~= "lora" then
    local optim = lc.adamw(student:trainable(), { lr = 1e-2 })
    time("transfer", function() return (student:transfer(ids)) end, optim)
end
if args.stage ~= "transfer" then
    student:use_linear():add_lora { rank = args.rank, alpha = 2 * args.rank }
    local optim = lc.adamw(student:trainable(), { lr = 1e-4 })
    time("lora", function()
        local loss = student:loss(ids)
        loss:backward()
        return loss:item()
    end, optim)
end

if args.json then
    print(lc.files.to_json(result))
else
    local rows = {}
    for _, name in ipairs { "transfer", "lora" } do
        local r = result[name]
        if r then
            rows[#rows + 1] = { name, ("%.3f"):format(r.seconds), ("%.3f"):format(r.best_seconds), ("%.0f"):format(r.tok_s), ("%.0f"):format(r.gflop),
                                ("%.0f"):format(r.gflops), ("%.0f"):format(r.gemm_gflops), ("%.0f %%"):format(100 * r.gemm_share),
                                ("%.0f"):format(r.peak_rss_mb) }
        end
    end
    print(("%s, %d x %d tokens, %s, %d threads, %s, GEMM by %s"):format(args.model, B, T, args.dtype, result.threads, result.isa, result.gemm))
    print(log.table(rows, { "step", "seconds", "best", "tokens/s", "GFLOP", "GFLOP/s", "GEMM GFLOP/s", "share", "peak MB" }))
end
