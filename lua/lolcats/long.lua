-- long.lua: training on texts longer than memory, chunk by chunk with a carried state, as the reference's `long`
-- attentions are trained. What a chunk computes is what the whole text would give at that place; gradients reach the
-- chunk's own tokens, and the state before it is a constant to them. Activations are those of one chunk. Losses are
-- means over all tokens, so the chunk length changes nothing but how far gradients reach.
local lc = require "lolcats"
local attention = require "lolcats.attention"
local tiles = require "lolcats.attention_tiles"

local M = {}

-- ---- one layer's attention behind a state ---------------------------------------------------------------------------
-- The op's ordinary form, on keys that stand for the state: the sums over features f become one key a feature, e_f *
-- zsum_f with the value sum_f / zsum_f, before the keys of the current window. Their number is rounded up to whole
-- windows, so that blocks stay where they are.
local function behind_state(a, q, k, v, fq, fk, st)
    local s, f = q.shape, fq:size(4)
    local b, h, t, d = s[1], s[2], s[3], s[4]
    local where = { dtype = q.dtype, device = q.device }
    local unit = math.max(1, a.window)
    local n = st.sum and math.ceil(f / unit) * unit or 0
    local keys, values, feats = { k }, { v }, { fk }
    local m = 0
    if st.k then
        m = st.k:size(3)
        keys, values, feats = { st.k, k }, { st.v, v }, { st.f, fk }
    end
    if n > 0 then
        local z = st.zsum:clamp { min = 1e-30 }:unsqueeze(-1)
        local function fill(x)
            if n == f then return x end
            return lc.cat({ x, lc.zeros({ b, h, n - f, x:size(4) }, where) }, 3)
        end
        local function here(x) return x.dtype ~= q.dtype and x:to { dtype = q.dtype } or x end
        table.insert(keys, 1, lc.zeros({ b, h, n, d }, where))
        table.insert(values, 1, fill(here(st.sum / z)))
        table.insert(feats, 1, fill(lc.eye(f, f, where):reshape(1, 1, f, f) * here(z)))
    end
    local function behind(x, width)
        if n + m == 0 then return x end
        return lc.cat({ lc.zeros({ b, h, n + m, width }, where), x }, 3)
    end
    local args = { mq = behind(fq, f), mk = #feats > 1 and lc.cat(feats, 3) or fk, map = "none", window = a.window,
                   kind = a.window > 0 and a.kind or nil, affine = a.affine, eps = a.eps }
    if a.window > 0 then args.factors = a.factors end
    local y = lc.hybrid_attention(behind(q, d), #keys > 1 and lc.cat(keys, 3) or k,
                                  #values > 1 and lc.cat(values, 3) or v, args)
    return n + m > 0 and y:narrow(3, n + m + 1, t) or y
end

-- Whether a record's attention is the op's.
local function plain_kind(a) return not (a.sinks or a.precision or a.compat or a.kind == "scale" or a.map.signed) end

--- The student's attention of a chunk q [b, h, t, d], k, v [b, g, t, d] that begins at ctx.seen, with gradients;
--- ctx.state (a table, empty at first) is moved on. Returns the output and both sides' features.
function M.attend(a, q, k, v, ctx)
    local h, t = q:size(2), q:size(3)
    if a.compat then lc.fail('compat = "reference" is not for training in chunks') end
    a = attention.faded(a)
    local fq, fk = attention.features(a, q, k, ctx)
    if fq.dtype ~= q.dtype then fq, fk = fq:to(q.dtype), fk:to(q.dtype) end
    if not plain_kind(a) then return attention.recurrent(a, q, k, v, fq, fk, ctx), fq, fk end
    local st = ctx.state
    k, v = attention.repeat_heads(k, h), attention.repeat_heads(v, h)
    local y = behind_state(a, q, k, v, fq, fk, st)
    lc.no_grad(lc.scope, function()
        local keys, values, feats = k:detach(), v:detach(), fk:detach()
        local places = lc.arange(ctx.seen, ctx.seen + t, 1,
                                 { dtype = q.dtype == "f64" and "f64" or "f32", device = q.device })
        if st.k then
            keys, values, feats = lc.cat({ st.k, keys }, 3), lc.cat({ st.v, values }, 3), lc.cat({ st.f, feats }, 3)
            places = lc.cat({ st.places, places }, 1)
        end
        attention.fold(a, st, keys, values, feats, places, ctx.seen + t)
    end)
    return y, fq, fk
end

-- Softmax attention of a chunk after what a cache holds, with gradients for the chunk's own q, k, v.
local function softmax(q, k, v, ctx)
    local st = ctx.state
    local n, t = ctx.seen, q:size(3)
    local keys, values = k, v
    if n > 0 and lc.grad_enabled() then
        keys, values = lc.cat({ st.k:narrow(3, 1, n), k }, 3), lc.cat({ st.v:narrow(3, 1, n), v }, 3)
        if not (q.requires_grad or k.requires_grad or v.requires_grad) then keys = nil end
    elseif n > 0 then
        keys = nil
    end
    lc.no_grad(function()
        attention.reserve(st, k:detach(), n, n + t)
        st.k:narrow(3, n + 1, t):copy_(k:detach())
        st.v:narrow(3, n + 1, t):copy_(v:detach())
    end)
    if not keys then keys, values = st.k:narrow(3, 1, n + t), st.v:narrow(3, 1, n + t) end
    return (lc.attention(q, keys, values, { window = ctx.window or 0 }))
end

-- ---- chunks ---------------------------------------------------------------------------------------------------------
local function free(states)
    for _, st in ipairs(states) do
        for _, part in pairs(st) do
            for _, x in pairs(part) do
                if lc.is_tensor(x) then x:drop() end
            end
        end
    end
end

-- Calls f(chunk of ids, its first position, ctx) for each chunk; states are freed at the end, however it comes.
local function chunks(model, ids, opts, f)
    if opts.start then lc.fail("training in chunks takes no left padding") end
    local size = opts.chunk or 1024
    if type(size) ~= "number" or size < 1 or size % 1 ~= 0 then
        lc.fail("chunk: a number of tokens, got %s", tostring(opts.chunk))
    end
    ids = model:check_ids(ids)
    local t, states, at = ids:size(2), {}, 0
    for i = 1, #model.layers do states[i] = { teacher = {}, student = {} } end
    local ok, problem = pcall(function()
        while at < t do
            local n = math.min(size, t - at)
            lc.scope(function()
                local part = ids:narrow(2, at + 1, n)
                f(part, at, model:context(part, { state = { seen = at } }), states, t)
            end)
            at = at + n
        end
    end)
    free(states)
    if not ok then error(problem, 0) end
end

local function embed(model, ids)
    local x = lc.embedding(model.embed, ids)
    return x.dtype ~= model.dtype and x:to(model.dtype) or x
end

local function call_of(layer, ctx, normed, state)
    return { state = state, seen = ctx.seen, pos = ctx.pos, layer = layer.index, hidden = normed,
             window = layer.window }
end

-- ---- attention transfer ---------------------------------------------------------------------------------------------
local function teach(student, layer, x, ctx, states, how)
    local normed = student:norm_in(layer, x)
    local q, k, v = student:qkv(layer, normed, ctx)
    local y = softmax(q, k, v, call_of(layer, ctx, normed, states.teacher))
    local a = layer.student
    if a then
        local loss = lc.scope(function()
            local function run()
                local y_pred, fq, fk = M.attend(a, q, k, v, call_of(layer, ctx, normed, states.student))
                local loss = how.mse ~= 0 and lc.mse_loss(y_pred, y) * how.mse
                -- weights are compared inside the chunk, as the reference does it
                if loss and loss.dtype ~= student.fine then loss = loss:to { dtype = student.fine } end
                local xent = how.xent ~= 0 and tiles.xent(a, q, k, fq, fk, { window = layer.window }) * how.xent
                if xent and xent.dtype ~= student.fine then xent = xent:to { dtype = student.fine } end
                loss = loss and xent and loss + xent or loss or xent
                if how.backward and loss.requires_grad then loss:backward() end
                return loss:item()
            end
            return how.backward and lc.enable_grad(run) or run()
        end)
        how.each[layer.index] = how.each[layer.index] + loss
    end
    if layer.index == how.last then return nil end
    return student:finish(layer, x, y, ctx)
end

--- Attention transfer on texts of any length, as student:transfer; opts also chunk (tokens, 1024). Besides the
--- activations of a chunk it needs the teacher's keys and values of the text so far.
function M.transfer(student, ids, opts)
    opts = opts or {}
    if require("lolcats.transfer_whole").needed(student) then
        lc.fail("adapters that learn in the first stage, and compat = 'flow', are not for training in chunks")
    end
    local how = { mse = opts.mse or 1000, xent = opts.xent or 0, backward = opts.backward ~= false, each = {},
                  last = 0 }
    if how.mse == 0 and how.xent == 0 then lc.fail("transfer: mse and xent are both 0; there is no loss") end
    local n = 0
    for i, layer in ipairs(student.layers) do
        how.each[i] = 0
        if layer.student then n, how.last = n + 1, i end
    end
    if n == 0 then lc.fail("transfer: every layer keeps its softmax attention; there is nothing to teach") end
    local mse, xent = how.mse, how.xent
    lc.no_grad(chunks, student, ids, opts, function(part, _, ctx, states, t)
        local share = (opts.scale or 1) / n * part:size(2) / t
        how.mse, how.xent = mse * share, xent * share
        local x = embed(student, part)
        for i = 1, how.last do
            local before = x
            x = lc.scope(teach, student, student.layers[i], x, ctx, states[i], how)
            before:drop()
        end
    end)
    local total = 0
    for i = 1, #how.each do
        total = total + how.each[i]
        how.each[i] = how.each[i] * n
    end
    return total, how.each
end

-- ---- next-token loss ------------------------------------------------------------------------------------------------
-- Flat rows (from 0) of a chunk that have a label, and the labels; the last position's is the first of the next chunk.
local function labelled(labels, at, n)
    local rows, wanted = {}, {}
    for i, list in ipairs(labels) do
        for j = at + 1, at + n do
            local label = list[j + 1]
            if label and label ~= -100 then rows[#rows + 1], wanted[#wanted + 1] = (i - 1) * n + j - at - 1, label end
        end
    end
    return rows, wanted
end

--- Next-token loss of a text of any length, chunk by chunk, each with its own backward (unless opts.backward is false):
--- the mean over all labels, as a number, and their count. opts: chunk (tokens, 1024), scale (of loss and gradients).
function M.loss(model, ids, labels, opts)
    opts = opts or {}
    ids = model:check_ids(ids)
    local list = labels or ids
    if lc.is_tensor(list) then list = list:totable() end
    if type(list[1]) ~= "table" then list = { list } end
    local all = select(2, labelled(list, 0, ids:size(2)))
    if #all == 0 then lc.fail("no label to learn from: every label is -100, or the row has a single token") end
    local total = 0
    chunks(model, ids, opts, function(part, at, ctx, states)
        local rows, wanted = labelled(list, at, part:size(2))
        local backward = opts.backward ~= false and lc.grad_enabled()
        local function run()
            local x = embed(model, part)
            for i, layer in ipairs(model.layers) do
                local normed = model:norm_in(layer, x)
                local q, k, v = model:qkv(layer, normed, ctx)
                local y
                if layer.student then
                    y = M.attend(layer.student, q, k, v, call_of(layer, ctx, normed, states[i].student))
                else
                    y = softmax(q, k, v, call_of(layer, ctx, normed, states[i].teacher))
                end
                x = model:finish(layer, x, y, ctx)
            end
            if #rows == 0 then return end
            x = lc.rms_norm(x, model.norm, model.config.rms_norm_eps)
            local loss = model:loss_at(x, rows, wanted) * (#rows / #all * (opts.scale or 1))
            if backward and loss.requires_grad then loss:backward() end
            total = total + loss:item()
        end
        if backward then run() else lc.no_grad(run) end
    end)
    return total, #all
end

return M
