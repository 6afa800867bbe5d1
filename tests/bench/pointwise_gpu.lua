-- pointwise_gpu.lua: elementwise ops, copies, conversions and optimizer steps alone on a GPU: microseconds a call of calls sent back to
-- back (medians of rounds), with the rate over the bytes that must move; the ceiling is the first line's.
--   lolcats tests/bench/pointwise_gpu.lua [--device cuda:0] [--rows 8192] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time elementwise ops.",
    { "device", "cuda:0", "where" },
    { "dtype", "bf16", "of activations" },
    { "rows", 8192, "tokens" },
    { "width", 4096, "hidden size" },
    { "ffn", 14336, "inner size of the MLP" },
    { "seconds", 0.15, "a round lasts at least so long" },
    { "only", "", "names that contain this" },
    { "plain", false, "the plain twins" },
    { "json", false, "one JSON object on stdout" },
}
local device, n, d, ffn = args.device, args.rows, args.width, args.ffn
local where, single = { dtype = args.dtype, device = device }, { dtype = "f32", device = device }
local each = ({ f32 = 4, f64 = 8 })[args.dtype] or 2
if args.plain then lc.set_option("plain_pointwise", true) end

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
local function case(name, bytes, run, gradient)
    if not name:find(args.only, 1, true) then return end
    local s = seconds(gradient and run or function() lc.no_grad(run) end)
    local r = { name = name, us = s * 1e6, gbs = bytes / s / 1e9 }
    result.ops[#result.ops + 1] = r
    rows[#rows + 1] = { name, ("%.1f"):format(r.us), ("%.0f"):format(r.gbs) }
end

lc.scope(function() -- [n, d]
    local x, y, f = lc.randn({ n, d }, where), lc.randn({ n, d }, where), lc.randn({ n, d }, single)
    local row, column = lc.randn({ d }, where), lc.randn({ n, 1 }, where)
    local one = n * d * each
    case("clone", 2 * one, function() return x:clone() end)
    case("add", 3 * one, function() return x + y end)
    case("mul", 3 * one, function() return x * y end)
    case("mul by a row", 2 * one, function() return x * row end)
    case("mul by a column", 2 * one, function() return x * column end)
    case("exp", 2 * one, function() return x:exp() end)
    case("gelu", 2 * one, function() return x:gelu() end)
    case("clone of half the columns", one, function() return x[{ {}, { 1, d / 2 } }]:clone() end)
    case("clone of a transposed matrix", 2 * one, function() return x:transpose(1, 2):clone() end)
    case("clone of heads", 2 * one, function() return x:reshape(n, d / 128, 128):transpose(1, 2):clone() end)
    case("to f32", one + n * d * 4, function() return x:to("f32") end)
    case("from f32", one + n * d * 4, function() return f:to(args.dtype) end)
    case("f32 += x", one + n * d * 8, function() return f:add_(x, 1e-3) end)
    case("x += x", 3 * one, function() return x:add_(y, 1e-3) end)
    case("scale_", 2 * one, function() return y:scale_(1) end)
    case("fill_", one, function() return y:fill_(1) end)
    case("dropout with its mask", 3 * one, function() return (lc.dropout(x, 0.05)) end)
    case("normal_", one, function() return y:normal_() end)
end)
lc.scope(function() -- [n, 2 ffn]: gate and up side by side, as one product leaves them
    local both, g = lc.randn({ n, 2 * ffn }, where), lc.randn({ n, ffn }, where)
    local gate, up = lc.randn({ n, ffn }, where):requires_grad_(true), lc.randn({ n, ffn }, where):requires_grad_(true)
    local one = n * ffn * each
    case("swiglu of column slices", 3 * one, function() return lc.swiglu(both[{ {}, { 1, ffn } }], both[{ {}, { ffn + 1, 2 * ffn } }]) end)
    case("swiglu", 3 * one, function() return lc.swiglu(gate, up) end)
    case("swiglu and its gradients, added to those there", 16 * one, function() lc.swiglu(gate, up):backward(g) end, true)
end)
lc.scope(function() -- the parameters of LoRA at 7B, in one buffer
    local count = 6815744
    local p, g, m, v = lc.randn({ count }, single), lc.randn({ count }, single), lc.zeros({ count }, single), lc.zeros({ count }, single)
    case("adamw_", 7 * 4 * count, function() lc.adamw_(p, g, m, v, 1e-4, 3, { weight_decay = 0.01 }) end)
end)

if args.json then
    print(lc.files.to_json(result))
else
    print(("microseconds a call, %s on %s, %d rows of %d"):format(args.dtype, device, n, d))
    print(log.table(rows, { "op", "us", "GB/s" }))
end
