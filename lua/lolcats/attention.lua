-- attention.lua: the attentions of a decoder layer over the ops. Softmax attention with a key/value cache; the hybrid
-- (window softmax + linear attention) on the fused op; and two plain twins composed from small ops: the quadratic form,
-- which also gives the attention weights, and a recurrent form with a state, which serves custom maps in decoding.
-- Shapes: q [b, h, t, d], k and v [b, g, t, d] with g dividing h, features [b, h, t, F].
local lc = require "lolcats"

local M = {}

--- Key/value heads repeated to the query heads: [b, g, t, d] -> [b, h, t, d], each head h / g times in a row.
function M.repeat_heads(x, h)
    local s = x.shape
    local b, g, t, d = s[1], s[2], s[3], s[4]
    if g == h then return x end
    return x:unsqueeze(3):expand(b, g, h / g, t, d):reshape(b, h, t, d)
end

-- ---- softmax --------------------------------------------------------------------------------------------------------
--- Causal softmax attention. state: a cache made by M.softmax_state, or nil. ctx.start: first real token of each row.
function M.softmax(q, k, v, ctx)
    local state = ctx.state
    if not state then
        return (lc.attention(q, k, v, { start = ctx.start, window = ctx.window or 0 }))
    end
    local t = q:size(3)
    local n = ctx.seen
    M.reserve(state, k, n, n + t)
    state.k:narrow(3, n + 1, t):copy_(k)
    state.v:narrow(3, n + 1, t):copy_(v)
    return (lc.attention(q, state.k:narrow(3, 1, n + t), state.v:narrow(3, 1, n + t),
                         { start = ctx.start, window = ctx.window or 0 }))
end

--- Grows a cache to hold at least `need` positions; doubles, so that appending is linear on the whole.
function M.reserve(state, k, n, need)
    local have = state.k and state.k:size(3) or 0
    if have >= need then return end
    local s = k.shape
    local room = math.max(need, 2 * have, 256)
    local opts = { dtype = k.dtype, device = k.device }
    for _, name in ipairs { "k", "v" } do
        local bigger = lc.keep(lc.empty({ s[1], s[2], room, s[4] }, opts))
        if n > 0 then bigger:narrow(3, 1, n):copy_(state[name]:narrow(3, 1, n)) end
        local old = state[name]
        state[name] = bigger
        if old then old:drop() end
    end
end

-- ---- the hybrid on the fused op -------------------------------------------------------------------------------------
--- Fresh state of one layer for `batch` rows, for prefill in chunks and decoding. opts: dtype (of the sums), device,
--- state (dtype of the state, where another one), cache (dtype of the cached keys and values).
function M.hybrid_state(layer, batch, heads, groups, dim, opts)
    local a = layer.student
    local ready = a.generic or not a.map.fused -- features come ready, and are cached beside the keys
    local f = ready and M.feature_width(layer, heads, dim, opts) or
        require("lolcats.feature_map").width(a.map, a.fq.layer:size(3))
    local state = {
        state = lc.keep(lc.zeros({ batch, heads, f, dim }, { dtype = opts.state or opts.dtype, device = opts.device })),
        zsum = lc.keep(lc.zeros({ batch, heads, f }, { dtype = opts.dtype, device = opts.device })),
    }
    if a.window > 0 then
        local shape = { batch, 2, groups, 2 * a.window, dim }
        if ready then shape = { batch, 2 * a.window * (2 * groups * dim + heads * f) } end
        state.cache = lc.keep(lc.zeros(shape, { dtype = opts.cache or opts.dtype, device = opts.device }))
    end
    return state
end

--- Features that a layer's map makes of one row, found by asking it.
function M.feature_width(layer, heads, dim, opts)
    return lc.no_grad(lc.scope, function()
        local where = { dtype = opts.dtype, device = opts.device }
        local ctx = { side = "q", layer = layer.index, pos = lc.zeros({ 1 }, { dtype = "i32", device = opts.device }),
                      hidden = lc.zeros({ 1, 1, layer.proj.q_proj.weight:size(2) }, where) }
        return layer.student.fq:features(lc.zeros({ 1, heads, 1, dim }, where), ctx):size(4)
    end)
end

--- Whether the rows of opts.state can be taken apart: those of caches and of the fused op can.
function M.has_rows(layers, opts)
    for i, layer in ipairs(layers) do
        local a = not opts.teacher and layer.student
        if opts.state.layers[i].rows or (a and a.window_only) then return false end
    end
    return true
end

--- The state of n rows from `first` on, which writes through to the whole. like: {shape, dtype, device} of the keys that
--- the whole is about to be given; caches grow before they are taken apart.
function M.rows_of(state, first, n, like)
    local part = { seen = state.seen, batch = n, layers = {}, pos = state.pos:narrow(1, first, n), as_teacher = state.as_teacher }
    for i, s in ipairs(state.layers) do
        if not s.state then M.reserve(s, like, state.seen, state.seen + like.shape[3]) end
        part.layers[i] = {}
        for name, x in pairs(s) do part.layers[i][name] = x:narrow(1, first, n) end
    end
    return part
end

--- The student's attention of one layer. a: {map, fq, fk, factors, kind, window, affine, window_only, generic}.
function M.hybrid(a, q, k, v, ctx)
    if a.window_only then return M.window_only(a, q, k, v, ctx) end
    if a.generic or not a.map.fused then return M.generic(a, q, k, v, ctx) end
    local st = ctx.state or {}
    local fq, fk = a.fq, a.fk
    local args = {
        mq = fq:weights(q:size(2)), mk = fk:weights(q:size(2)), map = a.map.op, full = a.map.full, skip = a.map.skip,
        window = a.window, kind = a.window > 0 and a.kind or nil, affine = a.affine, start = ctx.start,
        state = st.state, zsum = st.zsum, cache = st.cache, pos = ctx.state and ctx.pos_tensor or nil,
    }
    args.bq, args.bk = fq:effective_bias(), fk:effective_bias()
    if a.window > 0 then args.factors = a.factors end
    return (lc.hybrid_attention(q, k, v, args))
end

-- Features computed in Lua, then the op on ready features; the recurrent twin when there is a state.
function M.generic(a, q, k, v, ctx)
    local fq, fk = M.features(a, q, k, ctx)
    if fq.dtype ~= q.dtype then fq, fk = fq:to(q.dtype), fk:to(q.dtype) end
    local st = ctx.state or {}
    if ctx.state and not st.state then return M.recurrent(a, q, k, v, fq, fk, ctx) end
    local args = { mq = fq, mk = fk, map = "none", window = a.window, kind = a.window > 0 and a.kind or nil,
                   affine = a.affine, start = ctx.start, state = st.state, zsum = st.zsum, cache = st.cache,
                   pos = ctx.state and ctx.pos_tensor or nil }
    if a.window > 0 then args.factors = a.factors end
    return (lc.hybrid_attention(q, k, v, args))
end

--- Both sides' features by the maps in Lua, in the dtype of their parameters: f32 beside halves.
function M.features(a, q, k, ctx)
    local fine = q.dtype == "f64" and "f64" or "f32"
    if q.dtype ~= fine then q, k = q:to(fine), k:to(fine) end
    local pos = ctx.pos
    if not pos then
        local seen = ctx.seen or 0
        pos = lc.arange(seen, seen + q:size(3), 1, { dtype = "i32", device = q.device })
    end
    local function side(name)
        return { side = name, pos = pos, layer = ctx.layer, hidden = ctx.hidden }
    end
    return a.fq:features(q, side "q"), a.fk:features(M.repeat_heads(k, q:size(2)), side "k")
end

--- The hybrid without its linear part: what the window alone gives. Features of zeros add nothing to either sum.
function M.window_only(a, q, k, v, ctx)
    if a.window == 0 then lc.fail("window-only attention needs a window; this student is purely linear") end
    local s = q.shape
    local zero = lc.zeros({ s[1], s[2], s[3], 1 }, { dtype = q.dtype, device = q.device })
    if ctx.state then return M.recurrent(a, q, k, v, zero, zero, ctx) end
    return (lc.hybrid_attention(q, k, v, { mq = zero, mk = zero, map = "none", window = a.window, kind = a.kind,
                                           affine = a.affine, factors = a.factors, start = ctx.start }))
end

-- ---- plain twins ----------------------------------------------------------------------------------------------------
-- First key of the softmax window of query position i, both as float tensors or numbers.
local function window_start(i, kind, w)
    if kind == "sliding" then return (i - (w - 1)):clamp { min = 0 } end
    return ((i / w):floor() - 1):clamp { min = 0 } * w
end

local function window_start_number(i, kind, w)
    if w == 0 then return i end
    if kind == "sliding" then return math.max(0, i - w + 1) end
    return math.max(0, math.floor(i / w) - 1) * w
end

-- Queries at positions first_q.. against keys at first_k..: masks as uint8, 1 = not seen.
local function masks(tq, tk, first_q, first_k, kind, w, like)
    local opts = { dtype = like.dtype == "f64" and "f64" or "f32", device = like.device }
    local i = lc.arange(first_q, first_q + tq, 1, opts):reshape(tq, 1)
    local j = lc.arange(first_k, first_k + tk, 1, opts):reshape(1, tk)
    local future = j:gt(i:expand(tq, tk))
    if w == 0 then return future, nil, nil end
    local start = window_start(i, kind, w):expand(tq, tk)
    return future, j:lt(start), j:ge(start)
end

--- Quadratic softmax attention; returns the output and the weights [b, h, t, t]. window: keys that a query sees, itself
--- among them; nil: all.
function M.quadratic_softmax(q, k, v, window)
    local h, t, d = q:size(2), q:size(3), q:size(4)
    k, v = M.repeat_heads(k, h), M.repeat_heads(v, h)
    local future, outside = masks(t, t, 0, 0, "sliding", window or 0, q)
    local s = (q:matmul(k:transpose(-1, -2)) * d ^ -0.5):masked_fill(future, -math.huge)
    if outside then s = s:masked_fill(outside, -math.huge) end
    local a = s:softmax(-1)
    return a:matmul(v), a
end

--- The hybrid in its quadratic form on ready features; returns the output and the weights [b, h, t, t].
--- a: {kind, window, affine, factors}. The row maximum takes part in the gradient, as in the definition.
function M.quadratic(a, q, k, v, fq, fk)
    local h, t, d = q:size(2), q:size(3), q:size(4)
    k, v = M.repeat_heads(k, h), M.repeat_heads(v, h)
    local future, outside, inside = masks(t, t, 0, 0, a.kind, a.window, q)
    local g = fq:matmul(fk:transpose(-1, -2)):masked_fill(future, 0)
    local weights
    if a.window == 0 then
        weights = g / (g:sum(-1, { keep = true }) + 1e-12)
    else
        local gamma = a.factors:sigmoid()
        g = g:masked_fill(inside, 0)
        if a.affine then g = g * (1 - gamma) end
        local s = (q:matmul(k:transpose(-1, -2)) * d ^ -0.5):masked_fill(future, -math.huge)
        s = s:masked_fill(outside, -math.huge)
        local p = (s - s:amax(-1, { keep = true })):exp() * gamma
        weights = (p + g) / (p:sum(-1, { keep = true }) + g:sum(-1, { keep = true }))
    end
    return weights:matmul(v), weights
end

--- One chunk of t positions after ctx.seen earlier ones, with a state of constant size: the keys, values and features
--- of the current window, and the sums over everything before it. Any map, any split into chunks. Gradients reach this
--- chunk's inputs; what the state holds is a constant to them.
function M.recurrent(a, q, k, v, fq, fk, ctx)
    if ctx.start then
        lc.fail("the recurrent form of a custom feature map takes no left padding; give the rows one by one")
    end
    local st, n = ctx.state, ctx.seen
    local h, t, d = q:size(2), q:size(3), q:size(4)
    local rep_k, rep_v = M.repeat_heads(k, h), M.repeat_heads(v, h)
    local first = window_start_number(n, a.kind, a.window)
    local keys, values, feats = rep_k, rep_v, fk
    if st.k then
        keys, values, feats = lc.cat({ st.k, rep_k }, 3), lc.cat({ st.v, rep_v }, 3), lc.cat({ st.f, fk }, 3)
    end
    local tk = keys:size(3)
    local future, outside, inside = masks(t, tk, n, first, a.kind, a.window, q)
    local g = fq:matmul(feats:transpose(-1, -2)):masked_fill(future, 0)
    if inside then g = g:masked_fill(inside, 0) end
    local y, z = g:matmul(values), g:sum(-1, { keep = true })
    if st.sum then
        y = y + fq:matmul(st.sum)
        z = z + fq:matmul(st.zsum:unsqueeze(-1))
    end
    if a.window == 0 then
        y = y / (z + 1e-12)
    else
        local gamma = a.factors:sigmoid()
        if a.affine then y, z = y * (1 - gamma), z * (1 - gamma) end
        local s = (q:matmul(keys:transpose(-1, -2)) * d ^ -0.5):masked_fill(future, -math.huge)
        s = s:masked_fill(outside, -math.huge)
        local p = (s - s:amax(-1, { keep = true })):exp() * gamma
        y = (y + p:matmul(values)) / (z + p:sum(-1, { keep = true }))
    end
    lc.no_grad(M.fold, a, st, keys:detach(), values:detach(), feats:detach(), first, n + t)
    return y
end

-- Moves what has left the window of the next query into the sums, keeps the rest.
function M.fold(a, st, keys, values, feats, first, seen)
    local next_first = window_start_number(seen, a.kind, a.window)
    local out, tk = next_first - first, keys:size(3)
    local function replace(name, x)
        local old = st[name]
        st[name] = x and lc.keep(x) or nil
        if old then old:drop() end
    end
    if out > 0 then
        local f, v = feats:narrow(3, 1, out), values:narrow(3, 1, out)
        local sum, zsum = f:transpose(-1, -2):matmul(v), f:sum(3)
        if st.sum then sum, zsum = sum + st.sum, zsum + st.zsum end
        replace("sum", sum)
        replace("zsum", zsum)
    end
    if tk > out then
        replace("k", keys:narrow(3, out + 1, tk - out):clone())
        replace("v", values:narrow(3, out + 1, tk - out):clone())
        replace("f", feats:narrow(3, out + 1, tk - out):clone())
    else
        replace("k"); replace("v"); replace("f")
    end
end

return M
