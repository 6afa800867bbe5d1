-- test_attention.lua: the attentions themselves: every built-in map under every learned kernel in its three forms with
-- gradients, the reference's names, windows of any size, sinks, separate normalisers, and the cross entropy of
-- attention weights in tiles.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local maps = require "lolcats.feature_map"
local attention = require "lolcats.attention"
local tiles = require "lolcats.attention_tiles"
local types = require "lolcats.attention_types"

lc.manual_seed(3)
local F64 = { dtype = "f64" }

for _, name in ipairs(maps.names()) do
    t.test("map " .. name, function()
        local v = lc.check(name, { windows = { 0, 1, 3, 16 } })
        t.ok(v.ok, tostring(v))
        for _, kernel in ipairs { "tied", "adapter", "none" } do
            v = lc.check(name, { kernel = kernel, windows = { 4 } })
            t.ok(v.ok, kernel .. ": " .. tostring(v))
        end
    end)
end

t.test("options of maps", function()
    for _, o in ipairs { { "softmax_dim", skip = true }, { "softmax_dim", full = false },
                         { "relu", bias = true, init = "kaiming" },
                         { "relu", bias = "feature" }, { "softmax_dim", bias = "feature", init = "normal",
                                                         feature_dim = 3 },
                         { "l2", full = false, windows = { 4 } }, { "performer", feature_dim = 11 },
                         { "taylor", feature_dim = 5 },
                         { "exp_dim", skip = true, bias = true },
                         { "pos_elu", kernel = "untied_head_einsum", dim = 4, heads = 3 } } do
        local v = lc.check(o[1], { windows = o.windows or { 0, 4 }, skip = o.skip, full = o.full, bias = o.bias,
                                   init = o.init,
                                   feature_dim = o.feature_dim, kernel = o.kernel, dim = o.dim, heads = o.heads })
        if o[1] == "l2" then -- a cosine alone may be negative, and is said to be
            t.ok(v.finite and v.gradient and v["row-wise"] and v.positive == false, tostring(v))
        else
            t.ok(v.ok, tostring(v))
        end
    end
    t.errors(function() lc.check("relu", { kernel = "loose" }) end, "kernel is untied")
    t.ok(not lc.check("relu", { kernel = "adapter", feature_dim = 3 }).ok)
end)

t.test("what is special about the field's maps", function()
    local where = { dtype = "f64", device = "cpu" }
    local x = lc.randn({ 1, 2, 5, 6 }, F64)
    local function features(name, side, opts)
        local map = maps.builtin(name, opts)
        local ctx = { side = side or "k", pos = lc.arange(0, 5, 1, { dtype = "i32" }) }
        return map:instance(2, 6, where):features(x, ctx), map
    end
    local taylor = features("taylor", "k", { feature_dim = 6 })
    local s = x:matmul(x:transpose(-1, -2)) * 6 ^ -0.5
    t.close(taylor:matmul(taylor:transpose(-1, -2)), s + s * s * 0.5 + 1, 1e-12, "Taylor: 1 + s + s^2 / 2")
    local l2 = features "l2"
    local unit = x * x:square():sum(-1, { keep = true }):rsqrt()
    t.close(l2:matmul(l2:transpose(-1, -2)), unit:matmul(unit:transpose(-1, -2)) + 1, 1e-10)
    local cos = features "cosformer"
    local r, i = x:relu(), lc.arange(0, 5, 1, F64)
    local decay = ((i:reshape(5, 1) - i:reshape(1, 5)) * (math.pi / 2 / 4096)):cos()
    t.close(cos:matmul(cos:transpose(-1, -2)), r:matmul(r:transpose(-1, -2)) * decay, 1e-10)
    t.eq(features("dpfp"):size(4), 2 * 6 * 3)
    -- FAVOR+ estimates exp(q.k / sqrt(d)) without bias: the mean over many features comes near
    local small = x * 0.5
    local map = maps.builtin("performer", { feature_dim = 6000 })
    local f = map:instance(2, 6, where):features(small, { side = "k" })
    local want = (small:matmul(small:transpose(-1, -2)) * 6 ^ -0.5):exp()
    t.close(f:matmul(f:transpose(-1, -2)), want, 0.1)
    local inst = map:instance(2, 6, where)
    local again = map:instance(2, 6, where, inst)
    t.ok(not inst.omega.requires_grad and not again.omega.requires_grad)
    t.close(inst.omega, again.omega, 0, "q and k share their random directions")
    local w = maps.builtin("performer", { feature_dim = 6 }):instance(2, 6, where).omega
    local gram = w:transpose(-1, -2):matmul(w)
    t.close(gram * (1 - lc.eye(6, 6, F64)), lc.zeros({ 6, 6 }, F64), 1e-9, "orthogonal")
end)

local function record(name, h, d, opts)
    local map = maps.builtin(name, { full = opts.full, feature_dim = opts.feature_dim })
    local where = { dtype = "f64", device = "cpu" }
    local fq = map:instance(h, d, where)
    local a = { map = map, fq = fq, fk = map:instance(h, d, where, fq), kind = opts.kind, window = opts.window,
                affine = opts.affine,
                compat = opts.compat, sinks = opts.sinks }
    for _, inst in ipairs { a.fq, a.fk } do
        for _, p in ipairs(inst:parameters()) do p.tensor:detach():add_(lc.randn(p.tensor.shape, F64), 0.3) end
    end
    if opts.window > 0 then a.factors = lc.param(lc.full({ 1, h, 1, 1 }, -0.7, F64)) end
    return a
end

local function leaves(a)
    local out = {}
    for _, inst in ipairs { a.fq, a.fk } do
        for _, p in ipairs(inst:parameters()) do out[#out + 1] = p.tensor end
    end
    if a.factors then out[#out + 1] = a.factors end
    return out
end

local gradients = t.gradients

-- Rows that were worked out with the reference's own functions, to six digits: inputs and weights are sines.
t.test("worked examples of both windows and of the reference's terrace", function()
    local function sines(rows, columns, a, b, c)
        local out = {}
        for i = 1, rows do
            out[i] = {}
            for j = 1, columns do out[i][j] = math.sin(a * (i - 1) + b * (j - 1) + c) end
        end
        return lc.tensor(out, F64)
    end
    local function rows(n, kind, compat)
        local map = maps.builtin("softmax_dim", { feature_dim = 2 })
        local a = { map = map, kind = kind, window = 2, compat = compat,
                    factors = lc.full({ 1, 1, 1, 1 }, -2.1972245773362196, F64) }
        for side, x in pairs { q = { 0.9, 0.4, 0.2 }, k = { 0.5, 1.1, 0.6 } } do
            local inst = setmetatable({}, map.meta)
            inst.layer = sines(4, 2, unpack(x)):reshape(1, 4, 2)
            a["f" .. side] = inst
        end
        local function input(c) return sines(n, 4, 0.7, 1.3, c):reshape(1, 1, n, 4) end
        return attention.hybrid(a, input(0.1), input(0.5), input(0.9), { seen = 0 }):reshape(n, 4)
    end
    local function row(x, i, want) t.close(x:select(1, i), want, 2e-6) end
    local x = rows(2, "terrace", true)
    row(x, 1, { 0.783327, 0.808497, -0.350783, -0.996165 })
    row(x, 2, { 0.894866, 0.514881, -0.619405, -0.846262 })
    row(rows(2, "sliding"), 2, { 0.895283, 0.513783, -0.620410, -0.845701 })
    for _, compat in ipairs { false, true } do -- a multiple of the window: both agree
        x = rows(6, "terrace", compat)
        row(x, 3, { 0.855657, 0.150905, -0.774923, -0.565488 })
        row(x, 5, { 0.790708, 0.365675, -0.595073, -0.684037 })
        row(x, 6, { 0.705960, 0.358514, -0.514156, -0.633586 })
    end
    x = rows(5, "terrace", true)
    row(x, 4, { 0.753629, 0.581830, -0.442352, -0.818487 })
    row(x, 5, { 0.638384, 0.457876, -0.393421, -0.668356 })
    x = rows(6, "sliding")
    row(x, 4, { 0.862559, 0.430100, -0.632456, -0.768462 })
    row(x, 6, { 0.578915, -0.125142, -0.645866, -0.220395 })
end)

t.test("the fused op's gradients at the lengths where its panels end, with a bias", function()
    local h, d, f = 2, 6, 5
    for _, o in ipairs { { kind = "linear", window = 0 }, { kind = "sliding", window = 1 },
                         { kind = "terrace", window = 3 } } do
        for _, name in ipairs { "relu", "pos_elu" } do
            for _, n in ipairs { 1, 31, 32, 33, 65 } do
                local label = ("%s %s %d"):format(o.kind, name, n)
                local map = maps.builtin(name, { feature_dim = f, bias = true })
                local where = { dtype = "f64", device = "cpu" }
                local fq = map:instance(h, d, where)
                local a = { map = map, fq = fq, fk = map:instance(h, d, where, fq), kind = o.kind, window = o.window }
                if o.window > 0 then a.factors = lc.param(lc.full({ 1, h, 1, 1 }, -0.7, F64)) end
                local q, k, v = lc.randn({ 1, h, n, d }, F64), lc.randn({ 1, h, n, d }, F64),
                    lc.randn({ 1, h, n, d }, F64)
                local weight, list = lc.randn({ 1, h, n, d }, F64), leaves(a)
                local want = gradients(list,
                                       (attention.quadratic(a, q, k, v,
                                                            attention.features(a, q, k, {})) * weight):sum())
                local got = gradients(list, (attention.hybrid(a, q, k, v, { seen = 0 }) * weight):sum())
                for i = 1, #want do t.close(got[i], want[i], 1e-9, label .. ", gradient " .. i) end
            end
        end
    end
end)

t.test("sinks and separate normalisers: three forms, gradients, padding", function()
    local forms = require "lolcats.attention_forms"
    local h, g, d = 4, 2, 6
    for _, o in ipairs { { kind = "terrace", window = 4, sinks = 2 },
                         { kind = "sliding", window = 4, sinks = 3, affine = true },
                         { kind = "sliding", window = 5, sinks = 9 },
                         { kind = "terrace", window = 3, sinks = 1, affine = true },
                         { kind = "scale", window = 4 }, { kind = "scale", window = 64 } } do
        for _, n in ipairs { 1, 3, 8, 23, 32 } do
            local label = ("%s %d, %s sinks, %d tokens"):format(o.kind, o.window, tostring(o.sinks), n)
            local q, k, v = lc.randn({ 2, h, n, d }, F64), lc.randn({ 2, g, n, d }, F64), lc.randn({ 2, g, n, d }, F64)
            for _, x in ipairs { q, k, v } do x:requires_grad_(true) end
            local a = record("hedgehog", h, d, o)
            local list = leaves(a)
            for _, x in ipairs { q, k, v } do list[#list + 1] = x end
            local weight = lc.randn({ 2, h, n, d }, F64)
            local fq, fk = attention.features(a, q, k, {})
            local want = attention.quadratic(a, q, k, v, fq, fk)
            local whole = forms.hybrid(a, q, k, v, {})
            t.close(whole, want, 1e-11, label)
            local gw = gradients(list, (want * weight):sum())
            local gg = gradients(list, (whole * weight):sum())
            for i = 1, #gw do t.close(gg[i], gw[i], 1e-10, label .. ", gradient " .. i) end
            local state, at, rows, sizes, i = {}, 0, {}, { 3, 1, 1, 7 }, 1
            lc.no_grad(function()
                while at < n do
                    local m = math.min(sizes[i], n - at)
                    i = i % 4 + 1
                    local function cut(x) return x:detach():narrow(3, at + 1, m) end
                    rows[#rows + 1] = forms.hybrid(a, cut(q), cut(k), cut(v), { state = state, seen = at })
                    at = at + m
                end
                t.close(lc.cat(rows, 3), want, 1e-11, label .. ", in pieces")
                if n > 5 then
                    local y = forms.hybrid(a, q, k, v, { start = lc.tensor({ 0, 5 }, { dtype = "i32" }) })
                    local function cut(x) return x:detach():narrow(1, 2, 1):narrow(3, 6, n - 5):contiguous() end
                    t.close(cut(y), forms.hybrid(a, cut(q), cut(k), cut(v), {}), 1e-11, label .. ", padded")
                end
            end)
        end
    end
end)

t.test("cross entropy of weights in tiles equals the whole", function()
    local h, g, d, n = 4, 2, 6, 23
    for _, o in ipairs { { kind = "terrace", window = 4 }, { kind = "sliding", window = 5, affine = true },
                         { kind = "linear", window = 0 },
                         { kind = "terrace", window = 7, compat = true },
                         { kind = "terrace", window = 32, compat = true },
                         { kind = "scale", window = 4 }, { kind = "terrace", window = 4, sinks = 2 } } do
        local q = lc.randn({ 2, h, n, d }, F64):requires_grad_(true)
        local k = lc.randn({ 2, g, n, d }, F64):requires_grad_(true)
        local a = record("softmax_dim", h, d, o)
        local list = leaves(a)
        list[#list + 1], list[#list + 2] = q, k
        local v = lc.randn({ 2, g, n, d }, F64)
        for _, teacher in ipairs { 0, 6 } do
            local _, a_true = lc.no_grad(attention.quadratic_softmax, q, k, v, teacher)
            local function whole()
                local fq, fk = attention.features(a, q, k, {})
                local _, a_pred = attention.quadratic(a, q, k, v, fq, fk)
                return (a_pred:clamp({ min = 1e-12 }):log():log_softmax(-1) * a_true):sum() * (-1 / (2 * h * n))
            end
            local function tiled()
                local fq, fk = attention.features(a, q, k, {})
                return tiles.xent(a, q, k, fq, fk, { window = teacher }, { tile = 2 * h * n * 9 })
            end
            local x, y = whole(), tiled()
            local label = ("%s %d%s"):format(o.kind, o.window, o.compat and " compat" or "")
            t.close({ y:item() }, { x:item() }, 1e-10, label)
            local gx, gy = gradients(list, x), gradients(list, y * 1)
            for i = 1, #gx do t.close(gy[i], gx[i], 1e-9, label .. ", gradient " .. i) end
        end
    end
end)

t.test("cross entropy with left padding is that of the rows alone", function()
    local h, d, n = 2, 6, 17
    local q, k = lc.randn({ 2, h, n, d }, F64), lc.randn({ 2, h, n, d }, F64)
    local a = record("softmax_dim", h, d, { kind = "terrace", window = 3 })
    local fq, fk = attention.features(a, q, k, {})
    local pads, sum, rows = { 5, 0 }, 0, 0
    for i, p in ipairs(pads) do
        local function cut(x) return x:narrow(1, i, 1):narrow(3, p + 1, n - p):contiguous() end
        sum = sum + tiles.xent(a, cut(q), cut(k), cut(fq), cut(fk), {}):item() * (n - p)
        rows = rows + n - p
    end
    -- the columns of padding count in the reference's log-softmax: 1e-12 each
    t.close({ tiles.xent(a, q, k, fq, fk, { start = lc.tensor(pads, { dtype = "i32" }) }, { tile = 400 }):item() },
            { sum / rows }, 1e-9)
end)

t.test("memory of the cross entropy grows with the length, not with its square", function()
    local function peak(n)
        local q, k = lc.randn { 1, 2, n, 8 }, lc.randn { 1, 2, n, 8 }
        local map = maps.builtin "hedgehog"
        local where = { dtype = "f32", device = "cpu" }
        local a = { map = map, fq = map:instance(2, 8, where), fk = map:instance(2, 8, where), kind = "terrace",
                    window = 16,
                    factors = lc.param(lc.zeros { 1, 2, 1, 1 }) }
        collectgarbage() collectgarbage()
        local before = lc.memory "live"
        lc.reset_peak()
        lc.scope(function()
            local fq, fk = attention.features(a, q, k, {})
            tiles.xent(a, q, k, fq, fk, {}, { tile = 2 * n * 16 }):backward()
        end)
        return lc.memory "peak" - before
    end
    local short, long = peak(512), peak(2048)
    t.ok(long < 5 * short, ("%d bytes at 512, %d at 2048"):format(short, long))
end)

local CONFIG = { model_type = "llama", vocab_size = 61, hidden_size = 32, intermediate_size = 40, num_hidden_layers = 2,
                 num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 256,
                 initializer_range = 0.25 }
local function teacher(dtype)
    lc.manual_seed(1)
    return lc.model(CONFIG, { dtype = dtype or "f64" })
end
local function ids(n, seed) return t.ids(n, 61, seed) end

t.test("every attention of the reference by its name", function()
    local row = ids(29)
    for _, name in ipairs(types.names()) do
        local m = teacher()
        local window = not (name:match "_gen$" or name == "lolcats_llama" or name == "softmax") and 4 or nil
        local s = lc.linearize(m, { attention = name, window = window })
        if name == "softmax" then
            t.close(s:logits(row), m:logits(row), 0)
        else
            local a, b = s:transfer({ row }), s:transfer({ row }, { plain = true })
            t.ok(a > 0, name)
            t.close({ a }, { b }, 1e-9, name)
            t.ok(s:transfer({ row }, { xent = 1, mse = 0 }) > 0)
            local want, state, rows, at = lc.no_grad(s.logits, s, row), s:new_state(), {}, 0
            for _, n in ipairs { 9, 1, 1, 7, 1, 10 } do
                rows[#rows + 1] = s:lm_head(s:forward({ unpack(row, at + 1, at + n) }, { state = state }))
                at = at + n
            end
            local tol = name:match "bf16" and 0.3 or 1e-9 -- the rounding is of the whole, not of a decode
            t.close(lc.cat(rows, 2), want, tol, name .. ", decoded")
            s:drop_state(state)
        end
    end
    t.errors(function() lc.linearize(teacher(), { attention = "lolcats_llama_window_tkk" }) end,
             "did you mean 'lolcats_llama_window_tk'")
    t.errors(function() lc.linearize(teacher(), { attention = "lolcats_llama_window_tk", kind = "sliding" }) end,
             "means kind = terrace")
end)

t.test("rows with padding before them, in a carried state, decode as each row alone", function()
    for _, how in ipairs { { window = 4 }, { kind = "sliding", window = 5, map = "taylor" },
                           { kind = "linear", map = "cosformer" },
                           { window = 4, sinks = 2 }, { kind = "scale", window = 4 },
                           { window = 4, softmax_layers = { 1 } },
                           { attention = "softmax" }, { window = 3, window_only = true } } do
        local only = how.window_only
        how.window_only = nil
        local s = lc.linearize(teacher(), how)
        local pads, n = { 0, 7, 3, 12 }, 29
        local function run()
            local rows, whole = {}, {}
            for i, pad in ipairs(pads) do
                local row = ids(n - pad, 10 + i)
                whole[i] = lc.no_grad(s.logits, s, row)
                rows[i] = {}
                for j = 1, n do rows[i][j] = j <= pad and 0 or row[j - pad] end
            end
            for _, sizes in ipairs { { 20, 1, 1, 7 }, { 5, 10, 1, 13 } } do -- the second: padding reaches over chunks
                for _, slice in ipairs { 100000, 30 } do
                    local state, at, parts = s:new_state(#pads), 0, {}
                    for _, m in ipairs(sizes) do
                        local part = {}
                        for i = 1, #pads do part[i] = { unpack(rows[i], at + 1, at + m) } end
                        parts[#parts + 1] = s:lm_head(s:forward(part,
                                                                { state = state, start = at == 0 and pads or nil,
                                                                  tokens_at_once = slice }))
                        at = at + m
                    end
                    local got = lc.cat(parts, 2)
                    for i, pad in ipairs(pads) do
                        t.close(got:narrow(1, i, 1):narrow(2, pad + 1, n - pad), whole[i], 1e-9,
                                ("%s %s, row %d"):format(how.kind or how.attention or "terrace", how.map or "", i))
                    end
                    s:drop_state(state)
                end
            end
        end
        if only then s:window_only(run) else run() end
    end
    local s = lc.linearize(teacher(), { window = 4 })
    local state = s:new_state(2)
    s:forward({ { 1, 2 }, { 3, 4 } }, { state = state })
    t.errors(function() s:forward({ { 1 }, { 3 } }, { state = state, start = { 0, 1 } }) end, "first tokens of a state")
end)

t.finish()
