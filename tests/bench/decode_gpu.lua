-- decode_gpu.lua: greedy decoding on a GPU, many rows at once, ids staying there: tokens/s at batch sizes, the cost of a late position
-- against an early one, and prefill.
--   lolcats tests/bench/decode_gpu.lua [--model random:mistral-7b] [--batches 1,8,64,256] [--state bf16] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"
local decode = require "lolcats.decode"

local args = lc.args {
    "Time decoding and prefill on a GPU.",
    { "model", "random:mistral-7b", "a model, or random:SHAPE" },
    { "device", "cuda:0", "where" }, { "dtype", "bf16", "of weights and activations" },
    { "state", "f32", "dtype of the carried states" },
    { "batches", { 1, 8, 64, 256 }, "rows decoded at once" },
    { "prompt", 128, "tokens before the first one timed", min = 1 },
    { "steps", 128, "timed steps", min = 8 },
    { "prefill", 2048, "tokens of the prefill" },
    { "positions", { 1000, 100000 }, "positions whose cost is compared; empty: none" },
    { "teacher", false, "also the softmax model at batch 1" },
    { "eager", false, "no step is recorded as a graph" },
    { "profile", false, "also the time of each op, at every batch size" },
    { "json", false, "one JSON object on stdout" },
}
local device = args.device
lc.manual_seed(1)
local model = lc.load(args.model, { dtype = args.dtype, device = device }):freeze()
local student = lc.linearize(model, { map = "hedgehog" })
local vocab = model.config.vocab_size

local function ids(b, t)
    return (lc.rand({ b, t }, { device = device }) * (vocab - 1)):floor():to "i32"
end

-- Steps on ids [b, 1]: the likeliest next ids take their place, nothing is read back.
local function stepper(m, state, now)
    local steps = decode.new(m, state, now, function(x) now:copy_(m:lm_head(x):argmax(-1):reshape(-1, 1)) end)
    steps.records = steps.records and not args.eager
    return steps
end

-- What a step must read of states and caches, in GB; of a window's cache three quarters, on average over a block.
local BYTES = { f64 = 8, f32 = 4, bf16 = 2, f16 = 2 }
local function carried_gb(state)
    local n = 0
    for _, s in ipairs(state.layers) do
        for name, share in pairs { state = 1, zsum = 1, cache = 0.75 } do
            if s[name] then n = n + s[name]:numel() * BYTES[s[name].dtype] * share end
        end
    end
    return n / 1e9
end

local function time_decoding(m, batch, at, steps)
    local state = m:new_state(batch, { state_dtype = args.state })
    local now = lc.keep(ids(batch, 1))
    lc.no_grad(lc.scope, function() m:forward(ids(batch, args.prompt), { state = state }) end)
    if at then -- the state has one size wherever it stands, so a position is just a number
        state.seen = at
        state.pos:fill_(at)
    end
    local steps_of = stepper(m, state, now)
    local function go(n)
        for _ = 1, n do steps_of:step() end
        lc.sync(device)
    end
    go(8)
    local t0 = lc.now() -- what the host needs by itself: two steps, which no queue is too short for
    for _ = 1, 2 do steps_of:step() end
    local host = (lc.now() - t0) / 2
    lc.sync(device)
    t0 = lc.now()
    go(steps)
    local s = (lc.now() - t0) / steps
    local gb = carried_gb(state)
    if args.profile and not at then
        steps_of = stepper(m, state, now) -- its first step is not recorded
        io.stderr:write((lc.profile(function() t0 = lc.now(); go(1) end)), ("one step with the profile: %.2f ms\n"):format((lc.now() - t0) * 1e3))
    end
    now:drop()
    m:drop_state(state)
    lc.trim()
    return s, gb, host
end

local result, rows = { model = args.model, device = device, dtype = args.dtype, state = args.state, batches = {}, positions = {} }, {}
for _, b in ipairs(args.batches) do
    lc.reset_peak(device)
    local ok, s, gb, host = pcall(time_decoding, student, tonumber(b), nil, args.steps)
    if ok then
        result.batches[#result.batches + 1] = { batch = b, ms = s * 1e3, host_ms = host * 1e3, tok_s = b / s, carried_gb = gb, peak_gib = lc.memory("peak", device) / 2 ^ 30 }
        rows[#rows + 1] = { "decode, batch " .. b, ("%.2f"):format(s * 1e3), ("%.2f"):format(host * 1e3), ("%.0f"):format(b / s),
                            ("%.1f"):format(lc.memory("peak", device) / 2 ^ 30), ("%.2f"):format(gb) }
    else
        rows[#rows + 1] = { "decode, batch " .. b, "-", "-", tostring(s):match "^[^\n]*":sub(1, 60), "", "" }
    end
end
for _, at in ipairs(args.positions) do
    local s = time_decoding(student, 1, tonumber(at), args.steps)
    result.positions[#result.positions + 1] = { position = at, ms = s * 1e3 }
    rows[#rows + 1] = { "decode, position " .. at, ("%.2f"):format(s * 1e3), "", ("%.0f"):format(1 / s), "", "" }
end
if args.teacher then
    local s = time_decoding(model, 1, nil, args.steps)
    result.teacher_ms = s * 1e3
    rows[#rows + 1] = { "softmax decode, batch 1", ("%.2f"):format(s * 1e3), "", ("%.0f"):format(1 / s), "", "" }
end
if args.prefill > 0 then
    local text, times = lc.keep(ids(1, args.prefill)), {}
    for i = 0, 5 do
        local state = student:new_state(1)
        lc.sync(device)
        local t0 = lc.now()
        lc.no_grad(lc.scope, function()
            student:lm_head(student:forward(text, { state = state }):select(2, -1))
        end)
        lc.sync(device)
        if i > 0 then times[i] = lc.now() - t0 end
        student:drop_state(state)
    end
    table.sort(times)
    result.prefill_ms = times[3] * 1e3
    rows[#rows + 1] = { "prefill of " .. args.prefill, ("%.2f"):format(times[3] * 1e3), "", ("%.0f"):format(args.prefill / times[3]), "", "" }
end
if args.json then print(lc.files.to_json(result)) else
    print(log.table(rows, { "", "ms a step", "host ms", "tokens/s", "peak GiB", "state GB" }))
end
