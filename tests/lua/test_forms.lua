-- test_forms.lua: every feature map in a random choice of attentions (kind, window, sinks, affine, faded, grouped
-- heads, kernel, bias, halves) in its three forms: quadratic, all at once on the fused op or in blocks, and in pieces
-- with a carried state; gradients of all that has one; and rows with padding before them against each row alone.
--   lolcats tests/lua/test_forms.lua [SEED] [CASES]
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local maps = require "lolcats.feature_map"
local attention = require "lolcats.attention"

local F64 = { dtype = "f64" }
local SEED, CASES = tonumber(arg[1]) or 1, tonumber(arg[2]) or 3 -- cases of each map
math.randomseed(SEED)
lc.manual_seed(SEED)

local function pick(list) return list[math.random(#list)] end
local function chance(p) return math.random() < p end

local function case_of(name)
    local c = { name = name, kind = pick { "terrace", "sliding", "linear", "scale" }, h = pick { 2, 4 },
                d = pick { 4, 6, 8 },
                n = pick { 1, 2, 5, 9, 16, 23, 33, 40 }, map = {} }
    c.g = pick { c.h, c.h / 2 }
    c.window = c.kind == "linear" and 0 or pick { 1, 2, 3, 4, 5, 8, 17 }
    c.hybrid = c.kind == "terrace" or c.kind == "sliding"
    c.sinks = c.hybrid and chance(0.3) and pick { 1, 2, 5 } or nil
    c.affine = c.hybrid and chance(0.4)
    c.fade = c.hybrid and chance(0.2) and 0.3 or nil
    c.tied = chance(0.2)
    c.eps = chance(0.2) and 0.1 or nil
    c.map.feature_eps = chance(0.2) and 0.05 or nil
    if chance(0.3) then c.map.kernel = pick { "tied", "adapter", "none" }
    else
        if chance(0.4) and name ~= "l2" then c.map.full = false end
        if chance(0.3) then c.map.bias = pick { true, "feature" } end
    end
    c.label = ("%s, %s %d, sinks %s, affine %s, fade %s, %d of %d heads of %d, %d tokens, kernel %s, full %s, " ..
        "bias %s"):format(
        name, c.kind, c.window, tostring(c.sinks), tostring(c.affine), tostring(c.fade), c.g, c.h, c.d, c.n,
        tostring(c.map.kernel), tostring(c.map.full), tostring(c.map.bias))
    return c
end

-- The record of a case, and what has a gradient.
local function record(c)
    local map = maps.builtin(c.name, c.map)
    local where = { dtype = "f64", device = "cpu", options = { nu = 2, max_length = 64 } }
    local fq = map:instance(c.h, c.d, where)
    local a = { map = map, fq = fq, fk = c.tied and fq or map:instance(c.h, c.d, where, fq), kind = c.kind,
                window = c.window,
                affine = c.affine, sinks = c.sinks, fade = c.fade, eps = c.eps }
    local list = {}
    for _, inst in ipairs(c.tied and { fq } or { fq, a.fk }) do
        for _, p in ipairs(inst:parameters()) do
            if p.tensor.requires_grad then
                p.tensor:detach():add_(lc.randn(p.tensor.shape, F64), 0.3)
                list[#list + 1] = p.tensor
            end
        end
    end
    if c.window > 0 then a.factors = lc.param(lc.randn({ 1, c.h, 1, 1 }, F64)) end
    if c.hybrid then list[#list + 1] = a.factors end
    return a, list
end

local function close(got, want, tol, label)
    local top = want:abs():amax():item()
    t.close(got, want, tol * math.max(top, 1e-3), label)
end

local gradients = t.gradients

local function in_pieces(a, c, q, k, v)
    local layer = { student = a, index = 1, proj = { q_proj = { weight = lc.zeros({ 4, 4 }, F64) } } }
    local state = attention.hybrid_state(layer, 2, c.h, c.g, c.d, { dtype = "f64", device = "cpu" })
    if state.rows == 0 then state = {} end
    local at, rows = 0, {}
    while at < c.n do
        local m = math.min(pick { 1, 1, 3, 7 }, c.n - at)
        local function cut(x) return x:detach():narrow(3, at + 1, m):contiguous() end
        rows[#rows + 1] = attention.hybrid(a, cut(q), cut(k), cut(v),
                                           { seen = at, state = state, pos_tensor = lc.full({ 2 }, at,
                                               { dtype = "i32" }) })
        at = at + m
    end
    return lc.cat(rows, 3)
end

local function check(c)
    local a, list = record(c)
    local function input(heads) return lc.randn({ 2, heads, c.n, c.d }, F64):requires_grad_(true) end
    local q, k, v = input(c.h), input(c.g), input(c.g)
    for _, x in ipairs { q, k, v } do list[#list + 1] = x end
    local weight = lc.randn({ 2, c.h, c.n, c.d }, F64)
    -- row i from `pad` on; all rows without
    local function cut(x, i, pad) return i and x:narrow(1, i, 1):narrow(3, pad + 1, c.n - pad) or x end
    local function quadratic(i, pad)
        local plain = attention.faded(a)
        local q, k, v = cut(q, i, pad), cut(k, i, pad), cut(v, i, pad)
        local fq, fk = attention.features(plain, q, k, { seen = 0 })
        return (attention.quadratic(plain, q, k, v, fq, fk))
    end
    local want = quadratic()
    local slopes = gradients(list, (want * weight):sum())
    local function same(form, y)
        close(y, want, 1e-10, c.label .. ": " .. form)
        for i, g in ipairs(gradients(list, (y * weight):sum())) do
            close(g, slopes[i], 1e-7, ("%s: %s, gradient %d"):format(c.label, form, i))
        end
    end
    same("at once", attention.hybrid(a, q, k, v, { seen = 0 }))
    a.generic = true
    same("on ready features", attention.hybrid(a, q, k, v, { seen = 0 }))
    a.generic = nil
    local plain = attention.faded(a)
    local fq, fk = attention.features(plain, q, k, { seen = 0 })
    same("recurrent", attention.recurrent(plain, q, k, v, fq, fk, { state = {}, seen = 0 }))
    lc.no_grad(function()
        close(in_pieces(a, c, q, k, v), want, 1e-10, c.label .. ": in pieces")
        a.generic = true
        close(in_pieces(a, c, q, k, v), want, 1e-10, c.label .. ": in pieces, on ready features")
        a.generic = nil
    end)
    if c.n < 3 then return end
    local pads, pos = { 0, math.random(0, c.n - 1) }, {}
    for i = 1, 2 do
        pos[i] = {}
        for j = 1, c.n do pos[i][j] = math.max(0, j - 1 - pads[i]) end
    end
    local y = attention.hybrid(a, q, k, v,
                               { seen = 0, start = lc.tensor(pads, { dtype = "i32" }),
                                 pos = lc.tensor(pos, { dtype = "i32" }) })
    local together, alone = 0, 0
    for i, pad in ipairs(pads) do
        local row, w = quadratic(i, pad), cut(weight, i, pad)
        close(cut(y, i, pad), row, 1e-10, ("%s: %d before it"):format(c.label, pad))
        together, alone = (cut(y, i, pad) * w):sum() + together, (row * w):sum() + alone
    end
    slopes = gradients(list, alone)
    for i, g in ipairs(gradients(list, together)) do
        close(g, slopes[i], 1e-7, ("%s: %d before it, gradient %d"):format(c.label, pads[2], i))
    end
end

for _, name in ipairs(maps.names()) do
    t.test("forms of " .. name, function()
        for _ = 1, CASES do
            local c = case_of(name)
            lc.scope(check, c)
        end
    end)
end

t.finish()
