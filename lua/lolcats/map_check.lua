-- map_check.lua: lc.check: does a feature map keep its promises? Features must be finite and not negative; the
-- gradient must be that of the function; a row's features must depend on that row alone; and the quadratic, the
-- chunked and the recurrent form of the attention built on it must agree. Everything runs in float64 on small random
-- inputs.
local lc = require "lolcats"
local maps = require "lolcats.feature_map"
local attention = require "lolcats.attention"

local M = {}

local Verdict = {}
Verdict.__index = Verdict

function Verdict:__tostring()
    local out = {}
    for _, r in ipairs(self.rows) do
        out[#out + 1] = ("%-4s  %-34s %s"):format(r.ok and "ok" or "FAIL", r.name, r.detail)
    end
    out[#out + 1] = ("feature map '%s': %s"):format(self.name, self.ok and "passes every check" or "does not pass")
    return table.concat(out, "\n")
end

local function add(v, name, ok, detail)
    v.rows[#v.rows + 1] = { name = name, ok = ok, detail = detail }
    v[name] = ok
    v.ok = v.ok and ok
end

local function difference(a, b)
    return (a:detach() - b:detach()):abs():amax():item()
end

local function context(side, t, hidden)
    return { side = side, layer = 1, pos = lc.arange(0, t, 1, { dtype = "i32" }), hidden = hidden }
end

-- ---- single properties ----------------------------------------------------------------------------------------------
-- A map may have negative features where it says so (signed); what must not be negative are the weights q . k.
local function check_weights(v, fq, fk, x, hidden)
    local t = x:size(3)
    local y = fq:features(x, context("q", t, hidden))
    local z = fk:features(x + 0.3, context("k", t, hidden))
    local bad = lc.count_nonfinite(y):item() + lc.count_nonfinite(z):item()
    local low = y:matmul(z:transpose(-1, -2)):amin():item()
    add(v, "finite", bad == 0, bad == 0 and "no NaN, no infinity" or bad .. " features are NaN or infinite")
    add(v, "positive", bad == 0 and low >= -1e-12, ("features are signed; smallest weight q.k %.3g"):format(low))
end

local function check_positive(v, inst, x, ctx)
    local y = inst:features(x, ctx)
    local bad, low = lc.count_nonfinite(y):item(), y:amin():item()
    local empty = y:sum(-1):amin():item()
    add(v, "finite", bad == 0, bad == 0 and "no NaN, no infinity" or bad .. " features are NaN or infinite")
    add(v, "positive", bad == 0 and low >= 0, ("smallest feature %.3g"):format(low))
    add(v, "some feature in every row", bad == 0 and empty > 0,
        ("smallest sum of a row %.3g%s"):format(empty, empty > 0 and "" or
                                                "; add a small constant, the denominator may be 0"))
    return y
end

-- Central differences on a few entries of every parameter and of x, against backward.
local function check_gradient(v, inst, x, ctx)
    local weight
    local function loss()
        local y = inst:features(x, ctx)
        weight = weight or lc.randn(y.shape, { dtype = "f64" })
        return (y * weight):sum()
    end
    local leaves = inst:parameters()
    leaves[#leaves + 1] = { name = "x", tensor = x }
    for _, p in ipairs(leaves) do p.tensor:requires_grad_(true); p.tensor:zero_grad() end
    loss():backward()
    local step, worst, where = 1e-6, 0, "nothing to differentiate"
    for _, p in ipairs(leaves) do
        local n = p.tensor:numel()
        local flat = p.tensor:detach():reshape(-1)
        local g = p.tensor.grad and p.tensor.grad:reshape(-1)
        for s = 0, 9 do
            local i = math.floor(s * (n - 1) / 9) + 1
            local cell = flat:narrow(1, i, 1)
            local old = cell:item()
            local function at(value)
                cell:fill_(value)
                return lc.no_grad(lc.scope, function() return loss():item() end)
            end
            local num = (at(old + step) - at(old - step)) / (2 * step)
            cell:fill_(old)
            local got = g and g:narrow(1, i, 1):item() or 0
            local d = math.abs(num - got) / math.max(1, math.abs(num))
            if d >= worst then
                worst, where = d, ("%s[%d]: %.6g by backward, %.6g by differences"):format(p.name, i - 1, got, num)
            end
        end
    end
    x:requires_grad_(false)
    add(v, "gradient", worst < 1e-4, worst < 1e-4 and ("within %.1e of finite differences"):format(worst) or where)
end

local function check_rows(v, inst, x, hidden)
    local b, h, t = x:size(1), x:size(2), x:size(3)
    local ctx = context("q", t, hidden)
    local y = inst:features(x, ctx)
    local changed = x:clone()
    local row = math.floor(t / 2) + 1
    changed:narrow(3, row, 1):add_(lc.ones({ b, h, 1, x:size(4) }, { dtype = "f64" }), 0.5)
    local z = inst:features(changed, ctx)
    local before = difference(y:narrow(3, 1, row - 1), z:narrow(3, 1, row - 1))
    local after = difference(y:narrow(3, row + 1, t - row), z:narrow(3, row + 1, t - row))
    -- the same rows in a shorter sequence
    local half = { side = "q", layer = 1, pos = ctx.pos:narrow(1, row, t - row + 1),
                   hidden = hidden:narrow(2, row, t - row + 1) }
    local part = inst:features(x:narrow(3, row, t - row + 1):contiguous(), half)
    local alone = difference(part, y:narrow(3, row, t - row + 1))
    local worst = math.max(before, after, alone)
    add(v, "row-wise", worst < 1e-12, worst < 1e-12 and "a row's features depend on that row alone" or
        ("changing one row changes the features of others by %.3g"):format(worst))
end

-- ---- the three forms ------------------------------------------------------------------------------------------------
local function record(map, fq, fk, h, kind, window, affine)
    local a = { map = map, fq = fq, fk = fk, kind = kind, window = window, affine = affine, generic = true }
    if window > 0 then a.factors = lc.full({ 1, h, 1, 1 }, -1, { dtype = "f64" }) end
    return a
end

local function recurrent(a, q, k, v, hidden, sizes)
    local state, at, out = {}, 0, {}
    local t = q:size(3)
    local i = 1
    while at < t do
        local n = math.min(sizes[i], t - at)
        i = i % #sizes + 1
        local function cut(x) return x:narrow(3, at + 1, n):contiguous() end
        local ctx = { state = state, seen = at, layer = 1, hidden = hidden:narrow(2, at + 1, n),
                      pos = lc.arange(at, at + n, 1, { dtype = "i32" }) }
        out[#out + 1] = attention.generic(a, cut(q), cut(k), cut(v), ctx)
        at = at + n
    end
    return lc.cat(out, 3)
end

-- The carried state of the op, one row of it as sizes say; b rows with `start` padding before each.
local function carried(a, q, k, v, hidden, sizes, start)
    local b, t, h, g, d = q:size(1), q:size(3), q:size(2), k:size(2), q:size(4)
    local layer = { index = 1, student = a, proj = { q_proj = { weight = lc.zeros({ 1, hidden:size(3) }) } } }
    local state = attention.hybrid_state(layer, b, h, g, d, { dtype = "f64", device = "cpu" })
    local pos_tensor, at, out, i = lc.zeros({ b }, { dtype = "i32" }), 0, {}, 1
    while at < t do
        local n = math.min(sizes[i], t - at)
        i = i % #sizes + 1
        local function cut(x) return x:narrow(3, at + 1, n):contiguous() end
        local first = at == 0 and start or nil
        local pos = lc.arange(at, at + n, 1, { dtype = "f64" })
        if start then pos = (pos:reshape(1, n):expand(b, n) - start:to("f64"):reshape(b, 1)):clamp { min = 0 } end
        local ctx = { state = state, pos_tensor = pos_tensor, seen = at, layer = 1, start = first,
                      hidden = hidden:narrow(2, at + 1, n), pos = pos:to "i32" }
        out[#out + 1] = attention.hybrid(a, cut(q), cut(k), cut(v), ctx)
        local seen = lc.full({ b }, at + n, { dtype = "f64" })
        pos_tensor:copy_((start and seen - start:to "f64" or seen):to "i32")
        at = at + n
    end
    return lc.cat(out, 3)
end

local function inputs(dim, heads, b, t)
    local g = heads % 2 == 0 and heads / 2 or heads
    local function random(n) return lc.randn({ b, n, t, dim }, { dtype = "f64" }) end
    return random(heads), random(g), random(g), lc.randn({ b, t, heads * dim }, { dtype = "f64" })
end

local function kinds(w) return w == 0 and { "linear" } or { "terrace", "sliding" } end

-- Gradients for q, k, v, the map's parameters and the window factors: quadratic form, op, one recurrent chunk.
local function check_form_gradients(v, map, fq, fk, dim, heads, windows, tolerance)
    local t = 21
    local q, k, val, hidden = inputs(dim, heads, 2, t)
    local worst, where, n = 0, "", 0
    local weight = lc.randn({ 2, heads, t, dim }, { dtype = "f64" })
    for _, w in ipairs(windows) do
        for _, kind in ipairs(kinds(w)) do
            local a = record(map, fq, fk, heads, kind, w, w > 0)
            local leaves = { { name = "q", tensor = q }, { name = "k", tensor = k }, { name = "v", tensor = val } }
            if a.factors then leaves[4] = { name = "window factors", tensor = a.factors } end
            for _, inst in ipairs { fq, fk } do
                for _, p in ipairs(inst:parameters()) do leaves[#leaves + 1] = p end
            end
            local function gradients(form)
                for _, p in ipairs(leaves) do p.tensor:requires_grad_(true); p.tensor:zero_grad() end
                local ctx = { seen = 0, layer = 1, hidden = hidden, pos = lc.arange(0, t, 1, { dtype = "i32" }) }
                local pq, pk = attention.features(a, q, k, ctx)
                local y
                if form == "quadratic" then y = attention.quadratic(a, q, k, val, pq, pk)
                elseif form == "chunked" then y = attention.generic(a, q, k, val, ctx)
                elseif form == "fused map" then a.generic = nil; y = attention.hybrid(a, q, k, val, ctx)
                else ctx.state = {}; y = attention.recurrent(a, q, k, val, pq, pk, ctx) end
                ;(y * weight):sum():backward()
                local out = {}
                for i, p in ipairs(leaves) do out[i] = p.tensor.grad and p.tensor.grad:clone() or lc.zeros_like(p.tensor) end
                return out
            end
            local want = gradients "quadratic"
            local forms = { "chunked", "recurrent" }
            if map.fused then forms[3] = "fused map" end
            for _, form in ipairs(forms) do
                for i, g in ipairs(gradients(form)) do
                    local d = difference(g, want[i]) / math.max(1, want[i]:abs():amax():item())
                    n = n + 1
                    if not (d <= worst) then
                        worst, where = d, ("%s of %s, %s window %d"):format(leaves[i].name, form, kind, w)
                    end
                end
            end
        end
    end
    for _, x in ipairs { q, k, val } do x:requires_grad_(false) end
    add(v, "gradients of the three forms", worst <= tolerance,
        worst <= tolerance and ("%d comparisons within %.1e"):format(n, worst) or
        ("gradient for %s differs by %.3g"):format(where, worst))
end

-- Rows with padding before them, at once and with a carried state, against each row alone.
local function check_padding(v, map, fq, fk, dim, heads, windows, tolerance)
    local t, pads = 23, { 0, 5, 9 }
    local q, k, val, hidden = inputs(dim, heads, #pads, t)
    local start = lc.tensor(pads, { dtype = "i32" })
    local worst, where, n = 0, "", 0
    for _, w in ipairs(windows) do
        for _, kind in ipairs(kinds(w)) do
            local a = record(map, fq, fk, heads, kind, w, false)
            a.generic = nil
            local pos = (lc.arange(0, t, 1, { dtype = "f64" }):reshape(1, t):expand(#pads, t) -
                         start:to("f64"):reshape(#pads, 1)):clamp { min = 0 }
            local got = {
                ["at once"] = attention.hybrid(a, q, k, val, { seen = 0, start = start, layer = 1, hidden = hidden, pos = pos:to "i32" }),
                ["in pieces"] = carried(a, q, k, val, hidden, { 11, 1, 4 }, start),
            }
            for i, pad in ipairs(pads) do
                local function cut(x) return x:narrow(1, i, 1):narrow(3, pad + 1, t - pad):contiguous() end
                local ctx = { seen = 0, layer = 1, hidden = hidden:narrow(1, i, 1):narrow(2, pad + 1, t - pad),
                              pos = lc.arange(0, t - pad, 1, { dtype = "i32" }) }
                local pq, pk = attention.features(a, cut(q), cut(k), ctx)
                local want = attention.quadratic(a, cut(q), cut(k), cut(val), pq, pk)
                for form, y in pairs(got) do
                    local d = difference(cut(y), want)
                    n = n + 1
                    if not (d <= worst) then worst, where = d, ("%s, %s window %d, padding %d"):format(form, kind, w, pad) end
                end
            end
        end
    end
    add(v, "left padding", worst <= tolerance, worst <= tolerance and ("%d comparisons within %.1e"):format(n, worst) or
        ("%s differs by %.3g"):format(where, worst))
end

local function check_forms(v, map, fq, fk, dim, heads, windows, tolerance)
    local t, b, g = 37, 2, heads % 2 == 0 and heads / 2 or heads
    local function random(n) return lc.randn({ b, n, t, dim }, { dtype = "f64" }) end
    local q, k, val = random(heads), random(g), random(g)
    local hidden = lc.randn({ b, t, heads * dim }, { dtype = "f64" })
    local ctx = { seen = 0, layer = 1, hidden = hidden, pos = lc.arange(0, t, 1, { dtype = "i32" }) }
    local worst, where, n = 0, "", 0
    for _, w in ipairs(windows) do
        for _, kind in ipairs(w == 0 and { "linear" } or { "terrace", "sliding" }) do
            for _, affine in ipairs(w == 0 and { false } or { false, true }) do
                local a = record(map, fq, fk, heads, kind, w, affine)
                local pq, pk = attention.features(a, q, k, ctx)
                local want = attention.quadratic(a, q, k, val, pq, pk)
                local top = want:abs():amax():item()
                local forms = {
                    chunked = attention.generic(a, q, k, val, ctx),
                    ["recurrent, one by one"] = recurrent(a, q, k, val, hidden, { 1 }),
                    ["recurrent, odd chunks"] = recurrent(a, q, k, val, hidden, { 5, 1, 9 }),
                    ["carried state"] = carried(a, q, k, val, hidden, { 7, 1, 1, 10 }),
                }
                if map.fused then
                    a.generic = nil
                    forms["fused map"] = attention.hybrid(a, q, k, val, ctx)
                end
                for name, y in pairs(forms) do
                    local d = difference(y, want) / top
                    n = n + 1
                    if not (d <= worst) then
                        worst, where = d, ("%s, %s window %d%s"):format(name, kind, w, affine and ", affine" or "")
                    end
                end
            end
        end
    end
    add(v, "quadratic = chunked = recurrent", worst <= tolerance,
        worst <= tolerance and ("%d comparisons within %.1e"):format(n, worst) or
        ("%s differs by %.3g"):format(where, worst))
end

--- Checks a map (lc.feature_map{...}, a built-in name, or a file). opts: heads (2), dim (8), windows ({0, 4, 16}),
--- and the options of a built-in map. Returns a verdict: .ok, .rows, and text by tostring.
function M.check(map, opts)
    opts = opts or {}
    map = maps.resolve(map, opts)
    local heads, dim = opts.heads or 2, opts.dim or 8
    local v = setmetatable({ ok = true, rows = {}, name = map.name }, Verdict)
    local done, err = pcall(lc.scope, function()
        local where = { dtype = "f64", device = "cpu" }
        local fq = map:instance(heads, dim, where)
        local fk = map:instance(heads, dim, where, fq)
        -- off the symmetric start, so that nothing agrees by accident
        lc.no_grad(function()
            for _, inst in ipairs { fq, fk } do
                for _, p in ipairs(inst:parameters()) do
                    p.tensor:detach():add_(lc.randn(p.tensor.shape, { dtype = "f64" }), 0.1)
                end
            end
        end)
        local t = 11
        local x = lc.randn({ 2, heads, t, dim }, { dtype = "f64" })
        local hidden = lc.randn({ 2, t, heads * dim }, { dtype = "f64" })
        if map.signed then
            lc.no_grad(check_weights, v, fq, fk, x, hidden)
        else
            lc.no_grad(check_positive, v, fq, x, context("q", t, hidden))
        end
        check_gradient(v, fq, x, context("q", t, hidden))
        lc.no_grad(check_rows, v, fq, x, hidden)
        local windows, tolerance = opts.windows or { 0, 4, 16 }, opts.tolerance or 1e-8
        lc.no_grad(check_forms, v, map, fq, fk, dim, heads, windows, tolerance)
        check_form_gradients(v, map, fq, fk, dim, heads, windows, tolerance)
        lc.no_grad(check_padding, v, map, fq, fk, dim, heads, windows, tolerance)
    end)
    if not done then add(v, "runs", false, tostring(err)) end
    return v
end

return M
