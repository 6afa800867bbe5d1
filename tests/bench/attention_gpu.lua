-- attention_gpu.lua: the attention ops alone on a GPU: hybrid attention (Hedgehog, window 64) and softmax attention, forward and
-- forward with backward, in milliseconds a call of calls sent back to back (medians of rounds of at least `seconds`), with
-- the rate over counted FLOPs.
--   lolcats tests/bench/attention_gpu.lua [--device cuda:0] [--sizes 1x1024,64x1024] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"
local attention = require "lolcats.attention"

local args = lc.args {
    "Time the attention ops.",
    { "device", "cuda:0", "where" },
    { "dtype", "bf16", "of q, k, v" },
    { "heads", 32, "query heads" }, { "groups", 8, "key and value heads" }, { "dim", 128, "head dim" },
    { "feature_dim", 64, "learned features a head" },
    { "window", 64, "softmax window" },
    { "sizes", { "1x1024", "1x2048", "1x4096", "1x16384", "16x4096", "64x1024" }, "batch x length" },
    { "ops", { "hybrid", "softmax" }, "hybrid, softmax" },
    { "seconds", 0.3, "a round lasts at least so long" },
    { "custom", false, "also with features made ready: by themselves, and with Hedgehog's map written in Lua" },
    { "plain", false, "the plain twins" },
    { "json", false, "one JSON object on stdout" },
}
local device = args.device
if args.plain then lc.set_option("plain_hybrid", true) lc.set_option("plain_attention", true) end
local H, G, d, f, W = args.heads, args.groups, args.dim, args.feature_dim, args.window
local where = { dtype = args.dtype, device = device }

local function median(list)
    table.sort(list)
    return list[math.floor((#list + 1) / 2)]
end

-- Seconds a call.
local function time(run)
    local n, rounds = 1, {}
    for _ = 1, 3 do lc.scope(run) end
    lc.sync(device)
    for round = 0, 5 do
        local t0 = lc.now()
        for _ = 1, n do lc.scope(run) end
        lc.sync(device)
        local s = lc.now() - t0
        if round > 0 then rounds[#rounds + 1] = s / n end
        if round == 0 then
            n = 20
            t0 = lc.now()
            for _ = 1, n do lc.scope(run) end
            lc.sync(device)
            n = math.max(5, math.ceil(args.seconds / ((lc.now() - t0) / n)))
        end
    end
    return median(rounds)
end

-- [b, h, t, d] lying as [b, t, h, d], as projections make it
local function heads(b, t, n)
    return lc.randn({ b, t, n, d }, where):permute(1, 3, 2, 4)
end

local rows, result = {}, { device = device, dtype = args.dtype, heads = H, groups = G, dim = d, feature_dim = f, window = W, sizes = {} }
for _, size in ipairs(args.sizes) do
    local b, t = size:match "^(%d+)x(%d+)$"
    b, t = tonumber(b), tonumber(t)
    if not b then lc.fail("--sizes: '%s' is not BATCHxLENGTH", size) end
    local r = {}
    lc.scope(function()
        local q, k, v = heads(b, t, H), heads(b, t, G), heads(b, t, G)
        local g = heads(b, t, H)
        local mq = lc.param(lc.randn({ H, d, f }, { device = device }) * 0.1)
        local mk = lc.param(lc.randn({ H, d, f }, { device = device }) * 0.1)
        local factors = lc.param(lc.zeros({ 1, H, 1, 1 }, { device = device }))
        local call = { mq = mq, mk = mk, factors = factors, map = "softmax_dim", window = W }
        local tokens = b * t * H
        local flops = tokens * (4 * d * f + 6 * W * d + 8 * f * d) -- maps, window, state and its reading
        local forward = {
            hybrid = function() return (lc.hybrid_attention(q, k, v, call)) end,
            softmax = function() return (lc.attention(q, k, v)) end,
        }
        for _, name in ipairs(args.ops) do
            r[name] = time(function() lc.no_grad(forward[name]) end)
            local trained = { q, k, v }
            local function both() forward[name]():backward(g) end
            if name == "hybrid" then
                r.hybrid_transfer = time(both) -- gradients for maps and factors alone, as attention transfer wants
                for _, p in ipairs { mq, mk, factors } do p:zero_grad(); p:requires_grad_(false) end
            end
            for _, x in ipairs(trained) do x:requires_grad_(true) end
            r[name .. "_both"] = time(function()
                both()
                for _, x in ipairs(trained) do x:zero_grad() end
            end)
            for _, x in ipairs(trained) do x:requires_grad_(false) end
        end
        if args.custom then
            local function features(x, w) -- as a map in Lua computes them: in f32, [b, h, t, 2 f]
                local y = attention.repeat_heads(x:to "f32", H):matmul(w)
                return lc.cat({ y:softmax(-1), (-y):softmax(-1) }, -1):to(args.dtype)
            end
            local function op(fq, fk)
                return (lc.hybrid_attention(q, k, v, { mq = fq, mk = fk, factors = factors, map = "none", window = W }))
            end
            lc.no_grad(function()
                local fq, fk = features(q, mq), features(k, mk)
                r.ready = time(function() op(fq, fk) end)
                r.custom = time(function() op(features(q, mq), features(k, mk)) end)
            end)
        end
        r.tflops = r.hybrid and flops / r.hybrid / 1e12
    end)
    lc.trim()
    result.sizes[size] = r
    local function ms(x) return x and ("%.4f"):format(x * 1e3) or "-" end
    rows[#rows + 1] = { size, ms(r.hybrid), ms(r.hybrid_transfer), ms(r.hybrid_both), r.tflops and ("%.0f"):format(r.tflops) or "-",
                        ms(r.softmax), ms(r.softmax_both), args.custom and ms(r.ready) or nil, args.custom and ms(r.custom) or nil }
end
if args.json then print(lc.files.to_json(result)) else
    print(("milliseconds a call, %s on %s, %d/%d heads of %d, window %d, %d learned features"):format(args.dtype, device, H, G, d, W, f))
    print(log.table(rows, { "size", "hybrid", "+ maps' grad", "+ q,k,v grad", "TFLOP/s", "softmax", "+ q,k,v grad",
                            args.custom and "features ready" or nil, args.custom and "map in Lua" or nil }))
end
