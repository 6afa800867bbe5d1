-- attention_cpu.lua: what the hybrid attention op costs at growing lengths, forward and with the gradients of all inputs: seconds,
-- tokens/s, the ratio for eight times the length, and the share of the GEMM rate, measured in the same run, over counted FLOPs.
--   lolcats tests/bench/attention_cpu.lua [--rounds 9] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time hybrid attention by length.",
    { "lengths", { 512, 1024, 2048, 4096, 8192, 16384 }, "tokens a row" },
    { "rounds", 9, "timed rounds; each takes every length once, the medians count", min = 1 },
    { "heads", 9, "query heads", min = 1 },
    { "kv_heads", 3, "key and value heads", min = 1 },
    { "head_dim", 64, "numbers a head", min = 1 },
    { "feature_dim", 32, "inputs of the feature map; it makes twice as many features", min = 1 },
    { "window", 64, "softmax window", min = 0 },
    { "kind", "terrace", "how the window moves", { "terrace", "sliding" } },
    { "threads", 0, "threads; 0: as the program chooses" },
    { "json", false, "one JSON object on stdout" },
}
if args.threads > 0 then lc.threads(args.threads) end
local H, G, d, f, W = args.heads, args.kv_heads, args.head_dim, args.feature_dim, args.window
local F = 2 * f

-- ---- counted FLOPs: a multiplication and an addition are two; only what the method needs, in its cheapest known form ------------------
local function first_key(i) -- of query i's softmax window, counted from 0
    if W == 0 then return i + 1 end
    if args.kind == "sliding" then return math.max(i - W + 1, 0) end
    return math.max(math.floor(i / W) - 1, 0) * W
end

local function flops(t)
    local pairs_, readers = 0, 0
    for i = 0, t - 1 do
        local lo = first_key(i)
        pairs_ = pairs_ + i - lo + 1
        if lo > 0 then readers = readers + 1 end
    end
    local keys = first_key(t - 1) -- that some query takes linearly
    local window = 2 * H * d * pairs_                  -- one product of queries and window
    local read, absorb = 2 * H * F * d * readers, 2 * H * F * d * keys
    local map = 2 * H * d * f * (readers + keys)       -- both sides' features
    local forward = 2 * window + read + absorb + map
    -- backward: scores again, dP, dq, dk, dv; S again, d fq, R, d fk, dv; the maps' dx and dW
    return { forward = forward, both = forward + 5 * window + 2 * read + 3 * absorb + 2 * map }
end

-- ---- what is timed ---------------------------------------------------------------------------------------------------------------------
local function inputs(t)
    local function rows(heads) return lc.keep(lc.randn(1, t, heads, d)) end
    local x = { t = t, q = lc.param(rows(H)), k = lc.param(rows(G)), v = lc.param(rows(G)), g = rows(H):transpose(2, 3) }
    lc.keep(x.g)
    x.maps = { mq = lc.param(lc.randn(H, d, f) * 0.1), mk = lc.param(lc.randn(H, d, f) * 0.1), map = "softmax_dim", window = W }
    if W > 0 then x.maps.factors, x.maps.kind = lc.param(lc.zeros(1, H, 1, 1)), args.kind end
    x.leaves = { x.q, x.k, x.v, x.maps.mq, x.maps.mk, x.maps.factors }
    return x
end

local function attend(x) return (lc.hybrid_attention(x.q:transpose(2, 3), x.k:transpose(2, 3), x.v:transpose(2, 3), x.maps)) end

local run = {
    forward = function(x) lc.no_grad(attend, x) end,
    both = function(x) attend(x):backward(x.g) end,
}

local gemm_x, gemm_w = lc.keep(lc.randn(1024, 576), lc.randn(1536, 576))
local function gemm() lc.linear(gemm_x, gemm_w) end
local gemm_flops = 2 * 1024 * 576 * 1536

local function time(fn, x)
    local t0 = lc.now()
    lc.scope(fn, x)
    return lc.now() - t0
end

local function median(list)
    table.sort(list)
    local n = #list
    return n % 2 == 1 and list[(n + 1) / 2] or (list[n / 2] + list[n / 2 + 1]) / 2
end

lc.manual_seed(1)
local cases, times, gemms = {}, {}, {}
for i, t in ipairs(args.lengths) do cases[i], times[i] = inputs(t), { forward = {}, both = {} } end
for round = 0, args.rounds do
    for i, x in ipairs(cases) do
        for _, what in ipairs { "forward", "both" } do
            -- short ones more often: as much time for each
            local n = round == 0 and 1 or math.max(1, math.floor(8192 / x.t))
            local rate = lc.no_grad(time, gemm)
            -- The first call of a round is not counted: it finds the caches as another length left them, which costs the
            -- long ones most, for they would be called once and the short ones often.
            for call = 0, n do
                local s = time(run[what], x)
                if round > 0 and call > 0 then table.insert(times[i][what], s) end
                for _, p in ipairs(what == "both" and x.leaves or {}) do p.grad = nil end
            end
            if round > 0 then table.insert(gemms, rate) end
        end
        collectgarbage()
    end
end

-- ---- what is printed -------------------------------------------------------------------------------------------------------------------
local rate = gemm_flops / median(gemms)
local result = { heads = H, kv_heads = G, head_dim = d, feature_dim = f, window = W, kind = args.kind, threads = lc.threads(),
                 isa = lc.cpu_isa(), gemm = lc.cpu_gemm(), gemm_gflops = rate / 1e9, version = lc.version, lengths = {} }
local by_length = {}
for i, x in ipairs(cases) do
    local count, r = flops(x.t), { tokens = x.t }
    for what, list in pairs(times[i]) do
        local s = median(list)
        r[what] = { seconds = s, best_seconds = list[1], tok_s = x.t / s, gflop = count[what] / 1e9, gemm_share = count[what] / s / rate }
    end
    by_length[x.t] = r
    result.lengths[i] = r
    local short = by_length[x.t / 8]
    for what in pairs(short and times[i] or {}) do r[what].ratio = r[what].seconds / short[what].seconds end
end

if args.json then
    print(lc.files.to_json(result))
    return
end
print(("%d query heads, %d key heads of %d, %d features, %s window %d, %d threads, %s, GEMM %.0f GFLOP/s by %s"):format(
    H, G, d, F, args.kind, W, result.threads, result.isa, rate / 1e9, result.gemm))
local rows = {}
for _, r in ipairs(result.lengths) do
    local row = { ("%d"):format(r.tokens) }
    for _, what in ipairs { "forward", "both" } do
        local c = r[what]
        for _, cell in ipairs { ("%.2f"):format(c.seconds * 1e3), ("%.0f"):format(c.tok_s), ("%.0f %%"):format(100 * c.gemm_share),
                                c.ratio and ("%.2f"):format(c.ratio) or "" } do row[#row + 1] = cell end
    end
    rows[#rows + 1] = row
end
print(log.table(rows, { "tokens", "forward ms", "tokens/s", "share", "8x", "and backward ms", "tokens/s", "share", "8x" }))
