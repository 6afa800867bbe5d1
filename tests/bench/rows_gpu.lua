-- rows_gpu.lua: norms, rotation, reductions, softmax, indexing and losses alone on a GPU: microseconds a call of calls sent back to
-- back (medians of rounds), with the rate over the bytes that must move, or over the FLOPs of the products.
--   lolcats tests/bench/rows_gpu.lua [--device cuda:0] [--rows 8192] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time the ops on rows.",
    { "device", "cuda:0", "where" },
    { "dtype", "bf16", "of activations and weights" },
    { "rows", 8192, "tokens; with 1,024 most ops end before the next is sent" },
    { "width", 4096, "hidden size" },
    { "vocab", { "32000", "128256" }, "vocabulary sizes" },
    { "seconds", 0.15, "a round lasts at least so long" },
    { "only", "", "names that contain this" },
    { "json", false, "one JSON object on stdout" },
}
local device, n, d = args.device, args.rows, args.width
local where = { dtype = args.dtype, device = device }
local each = args.dtype == "f32" and 4 or 2

local function median(list)
    table.sort(list)
    return list[math.floor((#list + 1) / 2)]
end

local function seconds(run) -- a call
    local calls, rounds = 10, {}
    for _ = 1, 3 do lc.scope(run) end
    lc.sync(device)
    for round = 0, 5 do
        local t0 = lc.now()
        for _ = 1, calls do lc.scope(run) end
        lc.sync(device)
        local s = lc.now() - t0
        if round > 0 then rounds[#rounds + 1] = s / calls else calls = math.max(10, math.ceil(args.seconds / (s / calls))) end
    end
    return median(rounds)
end

local rows, result = {}, { device = device, dtype = args.dtype, rows = n, width = d, ops = {} }
-- passes: how often an operand of [rows, columns] is read or written; flops: of products
local function case(name, columns, passes, run, flops, gradient)
    if not name:find(args.only, 1, true) then return end
    local s = seconds(gradient and run or function() lc.no_grad(run) end)
    local r = { name = name, us = s * 1e6 }
    if flops then r.tflops = flops / s / 1e12 else r.gbs = passes * n * columns * each / s / 1e9 end
    result.ops[#result.ops + 1] = r
    rows[#rows + 1] = { name, ("%.1f"):format(r.us), r.gbs and ("%.0f"):format(r.gbs) or "-", r.tflops and ("%.0f"):format(r.tflops) or "-" }
end

lc.scope(function()
    local x, g = lc.randn({ n, d }, where), lc.randn({ n, d }, where)
    local w = lc.randn({ d }, where)
    local xg, wg = lc.randn({ n, d }, where):requires_grad_(true), lc.randn({ d }, where):requires_grad_(true)
    local function back(f, y) return function() f():backward(y) end end
    case("clone (the ceiling)", d, 2, function() return x:clone() end)
    case("rms_norm", d, 2, function() return (lc.rms_norm(x, w)) end)
    case("rms_norm and gradient for x", d, 5, back(function() return (lc.rms_norm(xg, w)) end, g), nil, true)
    case("rms_norm and gradients for x and w", d, 5, back(function() return (lc.rms_norm(xg, wg)) end, g), nil, true)
    local heads = d / 128
    local q = lc.randn({ 1, n, heads, 128 }, where):transpose(2, 3)
    local cos, sin = lc.rope_table(lc.arange(n, { dtype = "i32", device = device }), lc.randn({ 64 }, { device = device }):abs())
    case("rope", d, 2, function() return lc.rope(q, cos, sin) end)
    case("sum of rows", d, 1, function() return x:sum { dims = { -1 } } end)
    case("sum of columns", d, 1, function() return x:sum { dims = { 1 } } end)
    case("sum of all", d, 1, function() return x:sum() end)
    case("sum_squares of 8", d, 8, function() return lc.sum_squares { x, g, x, g, x, g, x, g } end)
    case("softmax of rows", d, 2, function() return x:softmax(-1) end)
    case("softmax of columns", d, 2, function() return x:softmax(1) end)
    case("argmax of rows", d, 1, function() return x:argmax(-1) end)
    case("cumsum of rows", d, 2, function() return x:cumsum(-1) end)
    local a, b = lc.randn({ 1, n, heads, 128 }, where):transpose(2, 3), lc.randn({ 1, n, heads, 128 }, where):transpose(2, 3)
    case("mse_loss of heads", d, 2, function() return lc.mse_loss(a, b) end)
    local ag = lc.randn({ 1, n, heads, 128 }, where):transpose(2, 3):requires_grad_(true)
    case("mse_loss of heads and gradient", d, 5, function() lc.mse_loss(ag, b):backward() end, nil, true)
    local ids = lc.arange(n, { dtype = "i32", device = device })
    case("embedding", d, 2, function() return lc.embedding(x, ids) end)
    local table_ = lc.randn({ n, d }, where):requires_grad_(true)
    case("embedding and gradient", d, 4, back(function() return lc.embedding(table_, ids) end, g), nil, true)
end)
for _, v in ipairs(args.vocab) do
    lc.scope(function()
        v = tonumber(v)
        local m = math.min(n, 1024)
        local labels = lc.arange(m, { dtype = "i32", device = device })
        local scale = m / n
        local logits = lc.randn({ m, v }, where):requires_grad_(true)
        case(("cross_entropy %d x %d"):format(m, v), v, scale, function() return lc.cross_entropy(logits, labels) end)
        case(("cross_entropy %d x %d and gradient"):format(m, v), v, 3 * scale, function() lc.cross_entropy(logits, labels):backward() end, nil, true)
        local x, w = lc.randn({ m, d }, where):requires_grad_(true), lc.randn({ v, d }, where)
        case(("linear_cross_entropy %d x %d"):format(m, v), v, 1, function() return (lc.linear_cross_entropy(x, w, labels)) end, 2 * m * d * v)
        case(("linear_cross_entropy %d x %d and gradient"):format(m, v), v, 1, function() lc.linear_cross_entropy(x, w, labels):backward() end,
             4 * m * d * v, true)
    end)
end
if args.json then print(lc.files.to_json(result)) else
    print(("microseconds a call, %s on %s, %d rows of %d"):format(args.dtype, device, n, d))
    print(log.table(rows, { "op", "us", "GB/s", "TFLOP/s" }))
end
