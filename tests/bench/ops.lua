-- ops.lua: what small operations cost from compiled Lua, in microseconds, best of five rounds.
--   lolcats tests/bench/ops.lua [--json]
local lc = require "lolcats"
local log = require "lolcats.log"
local args = lc.args { "Time small operations.", { "rounds", 5, "rounds; the best counts", min = 1 }, { "json", false, "one JSON object on stdout" } }

local cases = {}
local function case(name, n, body) cases[#cases + 1] = { name = name, n = n, body = body } end

-- Each body runs n times a round inside a scope of its own for every 100, as a training step would.
local function time(c)
    local best = math.huge
    for _ = 1, args.rounds + 1 do
        local t0 = lc.now()
        for _ = 1, c.n / 100 do lc.scope(c.body, 100) end
        best = math.min(best, (lc.now() - t0) / c.n)
    end
    return best * 1e6
end

lc.threads(1)
lc.manual_seed(0)
local a, b = lc.randn(8), lc.randn(8)
local p = lc.param(lc.randn(8))
local m, w = lc.randn(32, 32), lc.param(lc.randn(32, 32))

case("add of 8 floats, no gradient", 200000, function(n)
    for _ = 1, n do local _ = a + b end
end)
case("add of 8 floats, recorded", 200000, function(n)
    for _ = 1, n do local _ = p + b end
end)
case("add of a number", 200000, function(n)
    for _ = 1, n do local _ = a + 1 end
end)
case("add_ in place", 200000, function(n)
    for _ = 1, n do a:add_(b, 1e-9) end
end)
case("softmax of 8 floats", 100000, function(n)
    for _ = 1, n do local _ = a:softmax(-1) end
end)
case("matmul 32 x 32, no gradient", 50000, function(n)
    for _ = 1, n do local _ = m:matmul(m) end
end)
case("matmul 32 x 32, recorded", 50000, function(n)
    for _ = 1, n do local _ = m:matmul(w) end
end)
case("10 products of 8 floats, sum, backward", 10000, function(n)
    for _ = 1, n do
        local x = p
        for _ = 1, 10 do x = x * b end
        x:sum():backward()
    end
end)

local w1, b1, w2, b2 = lc.param(lc.randn(32, 16)), lc.param(lc.zeros(32)), lc.param(lc.randn(1, 32)), lc.param(lc.zeros(1))
local optim = lc.adamw({ w1, b1, w2, b2 }, { lr = 1e-3 })
local input, target = lc.randn(8, 16), lc.randn(8, 1)
case("MLP 16-32-1, batch 8: forward, backward, Adam", 10000, function(n)
    for _ = 1, n do
        lc.mse_loss(lc.linear(lc.linear(input, w1, b1):relu(), w2, b2), target):backward()
        optim:step()
        optim:zero_grad()
    end
end)
case("an empty scope", 100000, function(n)
    for _ = 1, n do lc.scope(function() end) end
end)

local result, rows = {}, {}
for i, c in ipairs(cases) do
    local us = time(c)
    result[i] = { name = c.name, us = us }
    rows[i] = { c.name, ("%.3f"):format(us) }
end
if args.json then
    print(lc.files.to_json(result))
else
    print(log.table(rows, { "operation", "microseconds" }))
end
