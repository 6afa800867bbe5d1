-- attention_tiles.lua: the cross entropy between the attention weights of teacher and student, in tiles of query rows:
-- a tile's weights are made, compared, differentiated and forgotten, so memory grows with the length, not with its
-- square. Each row's loss is the reference's: -sum_j true_j log_softmax(log max(pred, 1e-12))_j over all key columns.
local lc = require "lolcats"
local attention = require "lolcats.attention"

local M = {}

local FLOOR = 1e-12
local TILE = 4e6 -- entries of a tile's matrices

-- Which keys a tile's rows see: what attention.tile_masks makes of the student's kind, and the teacher's own window.
local function tile_loss(a, x, at, rows, how)
    local t, scale = how.t, how.scale
    local function q_rows(y) return y:narrow(3, at + 1, rows) end
    local n = at + rows
    local function k_rows(y) return y:narrow(3, 1, n) end
    local m = attention.tile_masks(a, at, rows, n, t, x.q, how)
    local s = x.q_tile:matmul(x.k_tile:transpose(-1, -2)) * scale
    local truth = lc.no_grad(function()
        local s_true = s
        if x.q_true then s_true = q_rows(x.q_true):matmul(k_rows(x.k_true):transpose(-1, -2)) * scale end
        s_true = s_true:masked_fill(m.future, -math.huge)
        if m.teacher then s_true = s_true:masked_fill(m.teacher, -math.huge) end
        return s_true:softmax(-1)
    end)
    local pred = attention.weights(a, s, x.fq_tile, x.fk_tile, m, x.factors)
    local floor = pred:clamp { min = FLOOR }
    local rest = floor:sum(-1) + (t - n) * FLOOR
    local each = rest:log() - (floor:log() * truth):sum(-1)
    if m.real then each = each * m.real end
    return each:sum()
end

local function leaf(x, want)
    x = x:detach()
    if want then x:requires_grad_(true) end
    return x
end

-- The loss and, where wanted, its gradients for q, k, fq, fk and the factors, as full tensors.
local function run(a, x, want, how)
    local b, h, t = x.q:size(1), x.q:size(2), how.t
    local rows = math.max(8, math.min(256, math.floor((how.tile or TILE) / (b * h * t))))
    -- summed where it lies: nothing waits for it
    local total, grads = lc.zeros({}, { dtype = x.q.dtype, device = x.q.device }), {}
    for name, on in pairs(want) do
        if on then grads[name] = lc.zeros_like(x[name]) end
    end
    local at = 0
    while at < t do
        local n = math.min(rows, t - at)
        lc.scope(function()
            local tile = { q = x.q, k = x.k, q_true = x.q_true, k_true = x.k_true }
            tile.q_tile, tile.fq_tile = leaf(x.q:narrow(3, at + 1, n), want.q), leaf(x.fq:narrow(3, at + 1, n), want.fq)
            tile.k_tile, tile.fk_tile = leaf(x.k:narrow(3, 1, at + n), want.k), leaf(x.fk:narrow(3, 1, at + n), want.fk)
            tile.factors = x.factors and leaf(x.factors, want.factors)
            local loss = lc.enable_grad(function()
                local loss = tile_loss(a, tile, at, n, how)
                if next(grads) and loss.requires_grad then loss:backward() end
                return loss
            end)
            local function add(name, grad, first, count)
                if grads[name] and grad then grads[name]:narrow(3, first, count):add_(grad) end
            end
            add("q", tile.q_tile.grad, at + 1, n)
            add("fq", tile.fq_tile.grad, at + 1, n)
            add("k", tile.k_tile.grad, 1, at + n)
            add("fk", tile.fk_tile.grad, 1, at + n)
            if grads.factors and tile.factors.grad then grads.factors:add_(tile.factors.grad) end
            total:add_(loss:detach())
        end)
        at = at + n
    end
    return total, grads
end

--- Mean over all rows of the cross entropy of the student's weights, as a tensor of one element with its gradient. a:
--- the student's record; q [b, h, t, d], k [b, g, t, d], fq and fk [b, h, t, F]. ctx: start (left padding; its rows do
--- not count), window (the teacher's own). opts: q_true, k_true (the teacher's, where they are not the student's),
--- tile.
function M.xent(a, q, k, fq, fk, ctx, opts)
    opts = opts or {}
    local fine = q.dtype == "f64" and "f64" or "f32" -- halves are compared in f32
    if q.dtype ~= fine then q, k = q:to(fine), k:to(fine) end
    if fq.dtype ~= fine then fq, fk = fq:to(fine), fk:to(fine) end
    local h, t, d = q:size(2), q:size(3), q:size(4)
    local start = ctx.start and ctx.start:totable()
    local count = q:size(1) * h * t
    if start then
        for _, s in ipairs(start) do count = count - h * s end
    end
    k = attention.repeat_heads(k, h)
    local q_true, k_true = opts.q_true, opts.k_true and attention.repeat_heads(opts.k_true, h)
    if k_true and k_true.dtype ~= fine then q_true, k_true = q_true:to(fine), k_true:to(fine) end
    local how = { t = t, scale = d ^ -0.5, start = ctx.start, teacher_window = ctx.window, tile = opts.tile }
    local recording = lc.grad_enabled()
    local function wants(x) return recording and x ~= nil and x.requires_grad end
    local factors = a.window > 0 and a.factors or nil
    local want = { q = wants(q), k = wants(k), fq = wants(fq), fk = wants(fk), factors = wants(factors) }
    local order = factors and { "q", "k", "fq", "fk", "factors" } or { "q", "k", "fq", "fk" }
    local f = lc.custom {
        name = "attention_xent",
        forward = function(ctx_, q_, k_, fq_, fk_, factors_)
            local x = { q = q_, k = k_, fq = fq_, fk = fk_, factors = factors_, q_true = q_true, k_true = k_true }
            local total, grads = run(a, x, want, how)
            ctx_.grads = grads
            return total * (1 / count)
        end,
        backward = function(ctx_, g)
            local out, n = {}, #order
            for i, name in ipairs(order) do
                local grad = ctx_.grads[name]
                out[i] = grad and grad * (g * (1 / count)) or nil
            end
            return unpack(out, 1, n)
        end,
    }
    if factors then return f(q, k, fq, fk, factors) end
    return f(q, k, fq, fk)
end

return M
