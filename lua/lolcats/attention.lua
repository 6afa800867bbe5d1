-- attention.lua: the attentions of a decoder layer over the ops. Softmax attention with a key/value cache; the hybrid
-- (window softmax + linear attention) on the fused op; and two plain twins composed from small ops: the quadratic form,
-- which also gives the attention weights, and a recurrent form with a state, which serves custom maps in decoding.
-- Shapes: q [b, h, t, d], k and v [b, g, t, d] with g dividing h, features [b, h, t, F].
local lc = require "lolcats"

local M = {}

local EPS = 1e-12 -- beside the sum of purely linear weights

--- Key/value heads repeated to the query heads: [b, g, t, d] -> [b, h, t, d], each head h / g times in a row.
function M.repeat_heads(x, h)
    local s = x.shape
    local b, g, t, d = s[1], s[2], s[3], s[4]
    if g == h then return x end
    return x:unsqueeze(3):expand(b, g, h / g, t, d):reshape(b, h, t, d)
end

-- Several sequences in one row: f on each by itself. Results lie as [b, t, h, d].
local function each_sequence(ctx, f, q, k, v)
    local out = {}
    for i, s in ipairs(ctx.sequences) do
        local part = {}
        for name, x in pairs(ctx) do part[name] = x end
        part.sequences, part.pos = nil, ctx.pos:narrow(1, s[1], s[2])
        part.hidden = ctx.hidden and ctx.hidden:narrow(2, s[1], s[2])
        out[i] = f(q:narrow(3, s[1], s[2]), k:narrow(3, s[1], s[2]), v:narrow(3, s[1], s[2]), part):transpose(2, 3)
    end
    return lc.cat(out, 2):transpose(2, 3)
end

-- ---- softmax --------------------------------------------------------------------------------------------------------
--- Causal softmax attention. state: a cache made by M.softmax_state, or nil. ctx.start: first real token of each row.
function M.softmax(q, k, v, ctx)
    if ctx.sequences then return each_sequence(ctx, M.softmax, q, k, v) end
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
                         { start = ctx.key_start or ctx.start, window = ctx.window or 0 }))
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
    if a.sinks or a.kind == "scale" or a.precision then return { rows = 0 } end -- the recurrent twin keeps its own
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

--- The state of n rows from `first` on, which writes through to the whole. like: {shape, dtype, device} of the keys
--- that the whole is about to be given; caches grow before they are taken apart.
function M.rows_of(state, first, n, like)
    local part = { seen = state.seen, batch = n, layers = {}, pos = state.pos:narrow(1, first, n),
                   as_teacher = state.as_teacher,
                   start = state.start and state.start:narrow(1, first, n), padding = state.padding }
    for i, s in ipairs(state.layers) do
        if not s.state then M.reserve(s, like, state.seen, state.seen + like.shape[3]) end
        part.layers[i] = {}
        for name, x in pairs(s) do part.layers[i][name] = x:narrow(1, first, n) end
    end
    return part
end

-- A record whose linear part counts `fade` times as much. Only the ratio of the two parts matters, gamma / lambda, and
-- in the affine form that is exp(factor): so a share becomes a shift of the factors.
function M.faded(a)
    if not a.fade or a.window == 0 then return a end
    local factors = a.affine and a.factors or a.factors:sigmoid():log()
    return setmetatable({ factors = factors - math.log(a.fade), affine = true, fade = false }, { __index = a })
end

--- The student's attention of one layer. a: {map, fq, fk, factors, kind, window, affine, window_only, generic, compat}.
function M.hybrid(a, q, k, v, ctx)
    if ctx.sequences then
        return each_sequence(ctx, function(q, k, v, part) return M.hybrid(a, q, k, v, part) end, q, k, v)
    end
    if a.drawn and lc.grad_enabled() then a = a.drawn end -- a smaller window, while training
    a = M.faded(a)
    if a.compat then return M.reference(a, q, k, v, ctx) end
    if a.sinks or a.kind == "scale" or a.precision then
        return require("lolcats.attention_forms").hybrid(a, q, k, v, ctx)
    end
    if a.window_only then return M.window_only(a, q, k, v, ctx) end
    if a.generic or not a.map.fused then return M.generic(a, q, k, v, ctx) end
    local st = ctx.state or {}
    local fq, fk = a.fq, a.fk
    local args = {
        mq = fq:weights(q:size(2)), mk = fk:weights(q:size(2)), map = a.map.op, full = a.map.full, skip = a.map.skip,
        window = a.window, kind = a.window > 0 and a.kind or nil, affine = a.affine, start = ctx.start,
        state = st.state, zsum = st.zsum, cache = st.cache, pos = ctx.state and ctx.pos_tensor or nil,
        eps = a.eps, feature_eps = a.map.feature_eps,
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
                   eps = a.eps,
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
    local s = q.shape -- a width that the fast kernels know
    local zero = lc.zeros({ s[1], s[2], s[3], ctx.state and 1 or 32 }, { dtype = q.dtype, device = q.device })
    if ctx.state then return M.recurrent(a, q, k, v, zero, zero, ctx) end
    return (lc.hybrid_attention(q, k, v, { mq = zero, mk = zero, map = "none", window = a.window, kind = a.kind,
                                           affine = a.affine, factors = a.factors, start = ctx.start }))
end

-- The reference's terrace as it is: quadratic where a text is read at once, the plain sliding window where it goes on
-- token by token; the two do not agree.
function M.reference(a, q, k, v, ctx)
    if ctx.start then
        lc.fail('compat = "reference" has no left padding (the reference ignores it); give rows one by one')
    end
    local y
    if ctx.state then
        y = M.hybrid(setmetatable({ kind = "sliding", compat = false }, { __index = a }), q, k, v, ctx)
    end
    if ctx.state and ctx.seen > 0 then return y end
    local fq, fk
    if a.window_only then
        local s = q.shape
        fq = lc.zeros({ s[1], s[2], s[3], 1 }, { dtype = q.dtype, device = q.device })
        fk = fq
    else
        fq, fk = M.features(a, q, k, ctx)
        if fq.dtype ~= q.dtype then fq, fk = fq:to(q.dtype), fk:to(q.dtype) end
    end
    return (M.quadratic(a, q, k, v, fq, fk))
end

-- ---- plain twins ----------------------------------------------------------------------------------------------------
-- First key of the softmax window of query position i, both as float tensors or numbers.
local function window_start(i, kind, w)
    if kind ~= "terrace" then return (i - (w - 1)):clamp { min = 0 } end
    return ((i / w):floor() - 1):clamp { min = 0 } * w
end

local function window_start_number(i, kind, w)
    if w == 0 then return i end
    if kind ~= "terrace" then return math.max(0, i - w + 1) end
    return math.max(0, math.floor(i / w) - 1) * w
end

-- Queries at positions i against keys at positions j (float tensors that broadcast to [.., tq, tk]): masks as uint8, 1
-- = left out. future: not seen at all; outside, inside: what the softmax and the linear part leave out. total: length
-- of the whole row, which only the reference's terrace looks at.
local function masks(a, i, j, total)
    local tq, tk = i:size(-2), j:size(-1)
    local future = j:gt(i)
    local w = a.window
    if w == 0 then return { future = future } end
    local shift = a.compat and a.kind == "terrace" and total and math.ceil(total / w) * w - total or 0
    local start = window_start(shift > 0 and i + shift or i, a.kind, w)
    local outside = (shift > 0 and j + shift or j):lt(start)
    if a.sinks then outside = (j:ge(a.sinks):to(i.dtype) * outside:to(i.dtype)):gt(0) end
    local inside = outside:eq(0)
    -- its masks of one block are twice the same: both parts see every key
    if a.compat and a.kind == "terrace" and total and total <= w then inside = nil end
    return { future = future, outside = outside, inside = inside, tq = tq, tk = tk }
end

local function range(first, n, like)
    return lc.arange(first, first + n, 1, { dtype = like.dtype == "f64" and "f64" or "f32", device = like.device })
end

--- Masks of a tile: `rows` queries from `at` on (from 0) against the first n keys of rows of t. how: start (left
--- padding; the result's `real` is 1 for rows that are no padding), teacher_window (`teacher`: what that leaves out).
function M.tile_masks(a, at, rows, n, t, like, how)
    local i, j = range(at, rows, like):reshape(rows, 1), range(0, n, like):reshape(1, n)
    local pad = how.start
    if pad then
        pad = pad:to(i.dtype):reshape(pad:size(1), 1, 1, 1)
        i, j = i - pad, j - pad
    end
    local m = masks(a, i, j, t)
    if how.teacher_window and how.teacher_window > 0 then m.teacher = j:lt(i - (how.teacher_window - 1)) end
    if pad then -- padding sees itself, so that its sums are not empty
        local hidden = (j:lt(0):to(i.dtype) * j:ne(i):to(i.dtype) + m.future:to(i.dtype)):gt(0)
        m.future, m.real = hidden, i:ge(0):to(i.dtype):squeeze(-1)
        if m.outside then m.outside = (m.outside:to(i.dtype) * j:ne(i):to(i.dtype)):gt(0) end
    end
    return m
end

-- The two parts of the weights: exp of the window's scores and the features' products, with their factors. s: scaled
-- scores [b, h, tq, tk], f: the products of the features. Where the window is 0 there is only the second.
local function parts(a, s, f, m, factors)
    local g = f:masked_fill(m.future, 0)
    if a.window == 0 then return nil, g end
    if m.inside then g = g:masked_fill(m.inside, 0) end
    local gamma = factors:sigmoid()
    if a.affine then g = g * (1 - gamma) end
    s = s:masked_fill(m.future, -math.huge):masked_fill(m.outside, -math.huge)
    return (s - s:amax(-1, { keep = true })):exp() * gamma, g
end

-- Another way to join them, with a normaliser each: the linear weights count against the sum over all keys, and what is
-- left goes to the window's softmax.
local function scale_weights(s, f, m)
    local all = f:masked_fill(m.future, 0)
    local before = all:masked_fill(m.inside, 0)
    local z = all:sum(-1, { keep = true })
    z = z + z:eq(0):to(z.dtype) * 1e-12
    local window = s:masked_fill(m.future, -math.huge):masked_fill(m.outside, -math.huge):softmax(-1)
    before = before / z
    return before + window * (1 - before:sum(-1, { keep = true }))
end

--- The student's attention weights [b, h, tq, tk] under masks of M.tile_masks. s: scaled scores, fq and fk: features.
function M.weights(a, s, fq, fk, m, factors)
    local f = fq:matmul(fk:transpose(-1, -2))
    if a.kind == "scale" then return scale_weights(s, f, m) end
    local p, g = parts(a, s, f, m, factors)
    if not p then return g / (g:sum(-1, { keep = true }) + (a.eps or EPS)) end
    return (p + g) / (p:sum(-1, { keep = true }) + g:sum(-1, { keep = true }))
end

--- Quadratic softmax attention; returns the output and the weights [b, h, t, t]. window: keys that a query sees, itself
--- among them; nil: all.
function M.quadratic_softmax(q, k, v, window)
    local h, t, d = q:size(2), q:size(3), q:size(4)
    k, v = M.repeat_heads(k, h), M.repeat_heads(v, h)
    local m = M.tile_masks({ window = 0 }, 0, t, t, t, q, { teacher_window = window })
    local s = (q:matmul(k:transpose(-1, -2)) * d ^ -0.5):masked_fill(m.future, -math.huge)
    if m.teacher then s = s:masked_fill(m.teacher, -math.huge) end
    local a = s:softmax(-1)
    return a:matmul(v), a
end

--- The hybrid in its quadratic form on ready features; returns the output and the weights [b, h, t, t].
--- a: {kind, window, affine, factors, sinks, compat}. The row maximum takes part in the gradient, as in the definition.
function M.quadratic(a, q, k, v, fq, fk)
    local h, t, d = q:size(2), q:size(3), q:size(4)
    k, v = M.repeat_heads(k, h), M.repeat_heads(v, h)
    local m = M.tile_masks(a, 0, t, t, t, q, {})
    local weights = M.weights(a, q:matmul(k:transpose(-1, -2)) * d ^ -0.5, fq, fk, m, a.factors)
    return weights:matmul(v), weights
end

-- Rows with padding before them are at different positions: each has a state of its own.
local function row_by_row(a, q, k, v, fq, fk, ctx)
    local st, t, out = ctx.state, q:size(3), {}
    local start = ctx.start and ctx.start:totable()
    if not st.by_row then
        st.by_row = {}
        for i = 1, q:size(1) do st.by_row[i] = { state = {}, seen = 0 } end
    end
    for i, row in ipairs(st.by_row) do
        local pad = start and start[i] or 0
        local zero = pad > 0 and lc.zeros({ 1, q:size(2), pad, q:size(4) }, { dtype = q.dtype, device = q.device })
        if pad == t then
            out[i] = zero
        else
            local function cut(x) return x:narrow(1, i, 1):narrow(3, pad + 1, t - pad) end
            local y = M.recurrent(a, cut(q), cut(k), cut(v), cut(fq), cut(fk), { state = row.state, seen = row.seen })
            row.seen = row.seen + t - pad
            out[i] = zero and lc.cat({ zero, y }, 3) or y
        end
    end
    return lc.cat(out, 1)
end

--- One chunk of t positions after ctx.seen earlier ones, with a state of constant size: the keys, values and features
--- of the current window, and the sums over everything before it. Any map, any split into chunks. Gradients reach this
--- chunk's inputs; what the state holds is a constant to them.
function M.recurrent(a, q, k, v, fq, fk, ctx)
    if ctx.start or ctx.state.by_row then return row_by_row(a, q, k, v, fq, fk, ctx) end
    local kind = q.dtype
    if kind ~= "f64" and kind ~= "f32" then -- halves are computed, and their sums carried, in f32
        q, k, v, fq, fk = q:to "f32", k:to "f32", v:to "f32", fq:to "f32", fk:to "f32"
    end
    local st, n = ctx.state, ctx.seen
    local h, t, d = q:size(2), q:size(3), q:size(4)
    local keys, values, feats = M.repeat_heads(k, h), M.repeat_heads(v, h), fk
    local places = range(n, t, q)
    if st.k then
        keys, values, feats = lc.cat({ st.k, keys }, 3), lc.cat({ st.v, values }, 3), lc.cat({ st.f, fk }, 3)
        places = lc.cat({ st.places, places }, 1)
    end
    local m = masks(a, range(n, t, q):reshape(t, 1), places:reshape(1, -1))
    local f = fq:matmul(feats:transpose(-1, -2))
    local s = a.window > 0 and q:matmul(keys:transpose(-1, -2)) * d ^ -0.5
    local y, z, before, all
    if st.sum then
        local sum, zsum = st.sum, st.zsum:unsqueeze(-1)
        before, all = fq:matmul(sum), fq:matmul(zsum)
    end
    if a.kind == "scale" then
        local g = f:masked_fill(m.future, 0)
        local total, far = g:sum(-1, { keep = true }), g:masked_fill(m.inside, 0)
        y, z = far:matmul(values), far:sum(-1, { keep = true })
        if all then y, z, total = y + before, z + all, total + all end
        total = total + total:eq(0):to(total.dtype) * 1e-12
        local window = s:masked_fill(m.future, -math.huge):masked_fill(m.outside, -math.huge):softmax(-1)
        y = y / total + window:matmul(values) * (1 - z / total)
    else
        local p, g = parts(a, s, f, m, a.factors)
        y, z = g:matmul(values), g:sum(-1, { keep = true })
        if all then
            local lambda = p and a.affine and 1 - a.factors:sigmoid()
            if lambda then before, all = before * lambda, all * lambda end
            y, z = y + before, z + all
        end
        if p then y, z = y + p:matmul(values), z + p:sum(-1, { keep = true }) else z = z + (a.eps or EPS) end
        y = y / z
    end
    lc.no_grad(M.fold, a, st, keys:detach(), values:detach(), feats:detach(), places, n + t)
    return y.dtype ~= kind and y:to { dtype = kind } or y
end

-- Moves what has left the window of the next query into the sums, keeps the rest; sinks stay.
function M.fold(a, st, keys, values, feats, places, seen)
    local next_first, sinks = window_start_number(seen, a.kind, a.window), a.window > 0 and a.sinks or 0
    local list = places:totable()
    local n, first, last = #list, nil, 0 -- what leaves is one run: after the sinks, before the window
    for i = 1, n do
        if list[i] >= sinks and list[i] < next_first then
            first, last = first or i, i
        end
    end
    local function replace(name, x)
        local old = st[name]
        st[name] = x and lc.keep(x) or nil
        if old then old:drop() end
    end
    local function rest(x, dim)
        if not first then return x:clone() end
        local parts_left = {}
        if first > 1 then parts_left[1] = x:narrow(dim, 1, first - 1) end
        if last < n then parts_left[#parts_left + 1] = x:narrow(dim, last + 1, n - last) end
        return #parts_left > 0 and lc.cat(parts_left, dim) or nil
    end
    if first then
        local f, v = feats:narrow(3, first, last - first + 1), values:narrow(3, first, last - first + 1)
        -- long sums of halves would stand still
        if f.dtype ~= "f64" and f.dtype ~= "f32" then f, v = f:to "f32", v:to "f32" end
        local sum, zsum = f:transpose(-1, -2):matmul(v), f:sum(3)
        if st.sum then sum, zsum = sum + st.sum, zsum + st.zsum end
        replace("sum", sum)
        replace("zsum", zsum)
    end
    local k, v, f, p = rest(keys, 3), rest(values, 3), rest(feats, 3), rest(places, 1)
    replace("k", k)
    replace("v", v)
    replace("f", f)
    replace("places", p)
end

return M
