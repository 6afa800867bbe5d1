-- gpu_gemm.lua: the products of a Mistral-7B step on a GPU, each beside a ceiling measured in the same run: large products (share of a
-- sustained 8192^3), few rows (share of a copy's rate: what decoding is bound by), LoRA's skinny products, and projections with
-- adapters against the same without. Calls go out back to back over weights that do not fit the second-level cache; medians
-- of rounds of at least `seconds`. --check compares each product with the plain kernel first.
--   lolcats tests/bench/gpu_gemm.lua [--device cuda:0] [--check] [--json]
local lc = require "lolcats"
local nn = require "lolcats.nn"

local args = lc.args {
    "Time matrix products.",
    { "device", "cuda:0", "where" },
    { "dtype", "bf16", "of weights and activations" },
    { "rows", 1024, "rows of the large products" },
    { "few", { 1, 2, 4, 8 }, "rows of the small ones" },
    { "spread", 256, "MB of weights that calls take turns over" },
    { "size", 8192, "of the product that is the ceiling" },
    { "seconds", 0.2, "a round lasts at least so long" },
    { "check", false, "compare with the plain kernel" },
    { "json", false, "one JSON object on stdout" },
}
local device, M = args.device, args.rows
local where = { dtype = args.dtype, device = device }
local BYTES = ({ f32 = 4, f64 = 8 })[args.dtype] or 2
local result = { device = device, dtype = args.dtype, rows = {} }

local function median(list)
    table.sort(list)
    return list[math.floor((#list + 1) / 2)]
end

-- Seconds a call of run(i), i counting calls.
local function time(run)
    local i = 0
    local function once(k) run(k) end -- what it returns is dropped
    local function calls(n)
        local t0 = lc.now()
        for _ = 1, n do
            i = i + 1
            lc.scope(once, i)
        end
        lc.sync(device)
        return (lc.now() - t0) / n
    end
    calls(3)
    local n, rounds = math.max(5, math.ceil(args.seconds / calls(20))), {}
    for r = 1, 5 do rounds[r] = calls(n) end
    return median(rounds)
end

local function show(name, seconds, value, unit, ceiling, what)
    result.rows[#result.rows + 1] = { name = name, us = seconds * 1e6, value = value, unit = unit, share = ceiling and value / ceiling }
    if not args.json then
        print(("%-44s %9.1f us  %8.1f %-8s%s"):format(name, seconds * 1e6, value, unit,
                                                    ceiling and (" %5.1f %% of %s"):format(100 * value / ceiling, what) or ""))
    end
end

local function randn(...) return lc.randn({ ... }, where) end

local function weights(n, k) -- enough of them to come from memory each time
    local list = {}
    for i = 1, math.max(1, math.ceil(args.spread * 1e6 / (n * k * BYTES))) do list[i] = lc.randn({ n, k }, where) * k ^ -0.5 end
    return list
end
local function turn(list, i) return list[i % #list + 1] end

local worst = 0
local function check(name, run)
    if not args.check then return end
    lc.scope(function()
        local fast = run(1):to("f32")
        lc.set_option("plain_linear", 1)
        local plain = run(1):to("f32")
        lc.set_option("plain_linear", 0)
        local d = (fast - plain):square():sum():item() ^ 0.5 / math.max(plain:square():sum():item() ^ 0.5, 1e-30)
        worst = math.max(worst, d == d and d or math.huge)
        if not (d < (BYTES == 2 and 6e-3 or 1e-5)) then print(("%-44s DIFFERS from the plain kernel by %.2g"):format(name, d)) end
    end)
end

local function section(f) lc.no_grad(lc.scope, f) end

-- ---- ceilings -----------------------------------------------------------------------------------------------------------
local copy_rate, gemm_rate
section(function()
    local n = math.ceil(args.spread * 1e6 / BYTES) * 2
    local from, to = lc.zeros({ n }, where):uniform_(), lc.zeros({ n }, where)
    local s = time(function() to:copy_(from) end)
    copy_rate = 2 * n * BYTES / s / 1e9
    show("copy on the device, read and written", s, copy_rate, "GB/s")
end)
section(function()
    local n = args.size
    local a, b = randn(n, n), randn(n, n)
    local s = time(function() return lc.linear(a, b) end)
    gemm_rate = 2 * n ^ 3 / s / 1e12
    show(("product %d^3"):format(n), s, gemm_rate, "TFLOP/s")
end)

-- ---- large products ------------------------------------------------------------------------------------------------------
local SHAPES = { { "q k v", 6144, 4096 }, { "o", 4096, 4096 }, { "k", 1024, 4096 }, { "gate up", 28672, 4096 }, { "gate", 14336, 4096 },
                 { "down", 4096, 14336 }, { "head", 32000, 4096 } }
for _, s in ipairs(SHAPES) do
    section(function()
        local name, n, k = s[1], s[2], s[3]
        local x, g, list = randn(M, k), randn(M, n), weights(n, k)
        local function forward(i) return lc.linear(x, turn(list, i)) end
        local function backward(i) return g:matmul(turn(list, i)) end
        check(name, forward)
        check(name .. ", for x", backward)
        local flops = 2 * M * n * k / 1e12
        local a, b = time(forward), time(backward)
        show(("%s: %d x %d, k %d"):format(name, M, n, k), a, flops / a, "TFLOP/s", gemm_rate, "the ceiling")
        show("  gradient for x", b, flops / b, "TFLOP/s", gemm_rate, "the ceiling")
    end)
end
section(function()
    local x, list = randn(M, 4096), weights(4096, 4096)
    local y = randn(M, 4096)
    local s = time(function(i) return lc.linear(x, turn(list, i), nil, y) end)
    show("o with a residual added", s, 2 * M * 4096 ^ 2 / s / 1e12, "TFLOP/s", gemm_rate, "the ceiling")
end)

-- ---- few rows ------------------------------------------------------------------------------------------------------------
for _, rows in ipairs(args.few) do
    for _, s in ipairs { { 6144, 4096 }, { 4096, 4096 }, { 28672, 4096 }, { 4096, 14336 }, { 32000, 4096 } } do
        section(function()
            local n, k = s[1], s[2]
            local x, list = randn(rows, k), weights(n, k)
            local function run(i) return lc.linear(x, turn(list, i)) end
            local name = ("%d row%s x [%d, %d]"):format(rows, rows > 1 and "s" or "", n, k)
            check(name, run)
            local t = time(run)
            show(name, t, n * k * BYTES / t / 1e9, "GB/s", copy_rate, "a copy's rate")
        end)
    end
end

-- ---- LoRA ----------------------------------------------------------------------------------------------------------------
local function skinny(name, bytes, run, adds)
    if not adds then check(name, run) end
    local t = time(run)
    show(name, t, bytes / t / 1e9, "GB/s", copy_rate, "a copy's rate")
end
section(function()
    local R, r = 24, 8
    local x, a, low, b, g = randn(M, 4096), randn(R, 4096), randn(M, R), randn(4096, r), randn(M, 4096)
    local narrow, ga, gb = low:narrow(2, 1, r), lc.zeros({ R, 4096 }, { device = device }), lc.zeros({ 4096, r }, { device = device })
    local y = randn(M, 4096)
    skinny("x a^T, three adapters", x:numel() * BYTES, function() return lc.linear(x, a) end)
    skinny("low b^T", y:numel() * BYTES, function() return narrow:matmul(b:transpose(1, 2)) end)
    skinny("g b", g:numel() * BYTES, function() return g:matmul(b) end)
    skinny("low a", x:numel() * BYTES, function() return low:matmul(a) end)
    skinny("a's gradients, three, in f32", x:numel() * BYTES, function() return ga:addmm_(low:transpose(1, 2), x) end, true)
    skinny("b's gradient, in f32", g:numel() * BYTES, function() return gb:addmm_(g:transpose(1, 2), narrow) end, true)
end)

local function projections(with)
    local list, params = {}, {}
    for i, n in ipairs { 4096, 1024, 1024 } do
        list[i] = { weight = randn(n, 4096) * 4096 ^ -0.5 }
        if with then
            list[i].lora = { a = lc.param(lc.randn({ 8, 4096 }, { device = device })), b = lc.param(lc.randn({ n, 8 }, { device = device })),
                             scale = 2, on = true }
        end
    end
    for _, side in ipairs(with and { "a", "b" } or {}) do
        for _, p in ipairs(list) do params[#params + 1] = { name = side, tensor = p.lora[side] } end
    end
    if with then nn.flatten(params) end
    return list
end
for _, with in ipairs { false, true } do
    lc.scope(function()
        local p, x = projections(with), lc.param(randn(M, 4096))
        local g = randn(M, 6144)
        local function forward() return nn.project_all(x, p[1], p[2], p[3]) end
        local function both() lc.cat({ forward() }, -1):backward(g) end -- cat costs two passes over g, with adapters or without
        local name = "q, k, v" .. (with and " with adapters" or "")
        local flops = 2 * M * 6144 * 4096 / 1e12
        local t = time(forward)
        show(name .. ", forward", t, flops / t, "TFLOP/s", gemm_rate, "the ceiling")
        t = time(both)
        show(name .. ", forward and backward", t, 2 * flops / t, "TFLOP/s", gemm_rate, "the ceiling")
    end)
end

if args.check then
    result.worst = worst
    if not args.json then print(("largest difference from the plain kernel: %.2g"):format(worst)) end
end
if args.json then print(lc.files.to_json(result)) end
