-- attention_forms.lua: attentions that the fused op does not know, composed from other ops with memory linear in the
-- length and with gradients: sink tokens, by blocks of one window; window and linear part with a normaliser each; and
-- arithmetic rounded to bfloat16, as one of the reference's variants has it (that one is quadratic).
-- Shapes as in attention.lua: q [b, h, t, d], k and v [b, g, t, d], features [b, h, t, F].
local lc = require "lolcats"
local attention = require "lolcats.attention"

local M = {}

-- Zeros behind (or, with front, before) along dim 3, n of them.
local function padded(x, n, front)
    if n == 0 then return x end
    local s = x.shape
    s[3] = n
    local zero = lc.zeros(s, { dtype = x.dtype, device = x.device })
    return lc.cat(front and { zero, x } or { x, zero }, 3)
end

-- ---- sinks ----------------------------------------------------------------------------------------------------------
-- [b, h, B * w, d] as blocks [b, h, B, w, d], and each block with the one before it [b, h, B, 2w, d].
local function blocks(x, w)
    local s = x.shape
    return x:reshape(s[1], s[2], s[3] / w, w, s[4])
end

local function with_previous(x)
    local n = x:size(3)
    local s = x.shape
    s[3] = 1
    local before = lc.zeros(s, { dtype = x.dtype, device = x.device })
    if n > 1 then before = lc.cat({ before, x:narrow(3, 1, n - 1) }, 3) end
    return lc.cat({ before, x }, 4)
end

-- Masks of all blocks, 1 = left out: near [B, w, 2w] and sinks [B, 1, s] for the softmax, linear [B, w, 2w].
local function block_masks(a, n, w, like)
    local opts = { dtype = like.dtype, device = like.device }
    local r = lc.arange(0, n, 1, opts):reshape(n, 1, 1)
    local i = r * w + lc.arange(0, w, 1, opts):reshape(1, w, 1)
    local j = (r - 1) * w + lc.arange(0, 2 * w, 1, opts):reshape(1, 1, 2 * w)
    local unseen = (j:gt(i):to(like.dtype) + j:lt(0):to(like.dtype)):gt(0)
    local outside = a.kind == "sliding" and (j:le(i - w):to(like.dtype) * j:ge(a.sinks):to(like.dtype)):gt(0)
    local near, linear = unseen, nil
    if outside then
        near = (unseen:to(like.dtype) + outside:to(like.dtype)):gt(0)
        linear = (unseen:to(like.dtype) + outside:eq(0):to(like.dtype)):gt(0)
    end
    local s = lc.arange(0, a.sinks, 1, opts):reshape(1, 1, a.sinks)
    return near, s:ge((r - 1) * w), linear
end

-- Sums over the blocks before the previous one: [b, h, B, ..] -> the same.
local function before_previous(x)
    local n = x:size(3)
    local s = x.shape
    s[3] = math.min(2, n)
    local zero = lc.zeros(s, { dtype = x.dtype, device = x.device })
    if n <= 2 then return zero end
    return lc.cat({ zero, x:narrow(3, 1, n - 2):cumsum(3) }, 3)
end

--- The hybrid where every query also keeps the first a.sinks keys in its window.
function M.sinks(a, q, k, v, fq, fk)
    local h, t, d, w = q:size(2), q:size(3), q:size(4), a.window
    k, v = attention.repeat_heads(k, h), attention.repeat_heads(v, h)
    local few = math.min(a.sinks, t)
    local sink_k, sink_v = k:narrow(3, 1, few):unsqueeze(3), v:narrow(3, 1, few):unsqueeze(3)
    local far = lc.arange(0, t, 1, { dtype = fk.dtype, device = fk.device }):ge(a.sinks)
    far = far:to(fk.dtype):reshape(1, 1, t, 1)
    local rest = (w - t % w) % w
    local Q, K, V = blocks(padded(q, rest), w), blocks(padded(k, rest), w), blocks(padded(v, rest), w)
    local FQ, FK = blocks(padded(fq, rest), w), blocks(padded(fk * far, rest), w)
    local n = Q:size(3)
    local near, sink, linear = block_masks({ kind = a.kind, sinks = few }, n, w, q)
    local K2, V2 = with_previous(K), with_previous(V)
    local scale = d ^ -0.5
    local s = lc.cat({ (Q:matmul(K2:transpose(-1, -2)) * scale):masked_fill(near, -math.huge),
                       (Q:matmul(sink_k:transpose(-1, -2)) * scale):masked_fill(sink, -math.huge) }, -1)
    local gamma = a.factors:sigmoid():unsqueeze(3)
    local p = (s - s:amax(-1, { keep = true })):exp() * gamma
    local window = p:narrow(-1, 1, 2 * w):matmul(V2) + p:narrow(-1, 2 * w + 1, few):matmul(sink_v)
    local lambda = a.affine and 1 - gamma or 1
    local y = FQ:matmul(before_previous(FK:transpose(-1, -2):matmul(V)))
    local z = FQ:matmul(before_previous(FK:sum(4):unsqueeze(-1)))
    if linear then
        local g = FQ:matmul(with_previous(FK):transpose(-1, -2)):masked_fill(linear, 0)
        y, z = y + g:matmul(V2), z + g:sum(-1, { keep = true })
    end
    y = (window + y * lambda) / (p:sum(-1, { keep = true }) + z * lambda)
    return y:reshape(q:size(1), h, t + rest, d):narrow(3, 1, t)
end

-- ---- a normaliser each ----------------------------------------------------------------------------------------------
-- y = sum_L (fq.fk) v / sum_all (fq.fk) + (1 - sum_L (fq.fk) / sum_all (fq.fk)) * softmax over the window.
local function scale(a, q, k, v, fq, fk)
    local t, w = q:size(3), a.window
    local near = lc.attention(q, k, v, { window = w })
    local function sum(f) return (fq * f:cumsum(3)):sum(-1, { keep = true }) end
    local all = sum(fk)
    if t <= w then return near end
    all = all + all:eq(0):to(all.dtype) * 1e-12
    local shifted = padded(fk:narrow(3, 1, t - w), w, true)
    local before = sum(shifted)
    local share = before / all
    local zero_k = padded(k:narrow(3, 1, t - w), w, true)
    local far = lc.hybrid_attention(q, zero_k, padded(v:narrow(3, 1, t - w), w, true),
                                    { mq = fq, mk = shifted, map = "none", window = 0 })
    -- the op divides by its sum plus 1e-12, which features near 0 feel
    return far * ((before + 1e-12) / all) + near * (1 - share)
end

-- ---- the door -------------------------------------------------------------------------------------------------------
--- Whether a record asks for one of these.
function M.wanted(a) return a.sinks or a.kind == "scale" or a.precision end

local function rounded(a, q, k, v, fq, fk)
    local function half(x) return x:to "bf16" end
    local b = setmetatable({ factors = half(a.factors) }, { __index = a })
    return (attention.quadratic(b, half(q), half(k), half(v), half(fq), half(fk)):to(q.dtype))
end

local function whole(a, q, k, v, ctx)
    local fq, fk
    if a.window_only then
        local s = q.shape
        fq = lc.zeros({ s[1], s[2], s[3], 1 }, { dtype = q.dtype, device = q.device })
        fk = fq
        if a.kind == "scale" then return (lc.attention(q, k, v, { window = a.window })) end
    else
        fq, fk = attention.features(a, q, k, ctx)
    end
    if ctx.state then return attention.recurrent(a, q, k, v, fq, fk, ctx) end
    if a.precision then return rounded(a, q, k, v, fq, fk) end
    local kind, fine = q.dtype, q.dtype == "f64" and "f64" or "f32"
    if kind ~= fine then q, k, v, fq, fk = q:to(fine), k:to(fine), v:to(fine), fq:to(fine), fk:to(fine) end
    local y = (a.kind == "scale" and scale or M.sinks)(a, q, k, v, fq, fk)
    return kind ~= fine and y:to { dtype = kind } or y
end

--- The student's attention of one layer, as attention.hybrid. Rows with padding are computed one by one.
function M.hybrid(a, q, k, v, ctx)
    if ctx.state or not ctx.start then return whole(a, q, k, v, ctx) end
    local out, t = {}, q:size(3)
    for i, pad in ipairs(ctx.start:totable()) do
        local function cut(x) return x:narrow(1, i, 1):narrow(3, pad + 1, t - pad) end
        local row = { seen = 0, layer = ctx.layer,
                      hidden = ctx.hidden and ctx.hidden:narrow(1, i, 1):narrow(2, pad + 1, t - pad),
                      pos = lc.arange(0, t - pad, 1, { dtype = "i32", device = q.device }) }
        out[i] = pad == t and lc.zeros({ 1, q:size(2), t, q:size(4) }, { dtype = q.dtype, device = q.device }) or
            padded(whole(a, cut(q), cut(k), cut(v), row), pad, true)
    end
    return lc.cat(out, 1)
end

return M
