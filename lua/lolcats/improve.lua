-- improve.lua: what goes beyond the reference's recipe, each an option of a training loop: a second-stage loss with the
-- teacher's distribution (KL on logits, never all logits at once), windows drawn smaller while training so that the
-- linear part is used, a linear part that fades in, and a measured choice of the layers that keep their softmax.
local lc = require "lolcats"

local M = {}

-- ---- KL on logits ---------------------------------------------------------------------------------------------------
-- Loss and its gradient for the student's rows x [n, H], a chunk of rows at a time: ce * cross entropy + kl * T^2 *
-- KL(teacher || student) at temperature T, each a mean over the rows.
local function logit_losses(x, y, head, wanted, how)
    local n, at, ce, kl = x:size(1), 0, 0, 0
    local grad = how.grad and lc.empty(x.shape, { dtype = x.dtype, device = x.device })
    local T = how.temperature
    while at < n do
        local m = math.min(how.chunk, n - at)
        lc.scope(function()
            local part = x:narrow(1, at + 1, m):detach()
            if grad then part:requires_grad_(true) end
            local logits = (grad and lc.enable_grad or lc.no_grad)(lc.linear, part, head) -- its gradient knows every kind of head
            local student = logits:detach()
            if student.dtype ~= "f64" then student = student:to "f32" end
            local slope
            if how.ce ~= 0 then
                local p = student:log_softmax(-1)
                local ids = wanted:narrow(1, at + 1, m):reshape(m, 1)
                ce = ce - p:gather(2, ids):sum():item()
                if grad then
                    slope = p:exp():scatter_add(2, ids, lc.full({ m, 1 }, -1, { dtype = p.dtype, device = p.device })) * (how.ce / n)
                end
            end
            if how.kl ~= 0 then
                local p = (student * (1 / T)):log_softmax(-1)
                local q = lc.linear(y:narrow(1, at + 1, m), head)
                q = ((q.dtype ~= p.dtype and q:to { dtype = p.dtype } or q) * (1 / T)):log_softmax(-1)
                local weight = q:exp()
                kl = kl + ((q - p) * weight):sum():item() * T * T
                if grad then
                    local g = (p:exp() - weight) * (how.kl * T / n)
                    slope = slope and slope + g or g
                end
            end
            if grad then
                logits:backward(slope.dtype ~= logits.dtype and slope:to { dtype = logits.dtype } or slope)
                grad:narrow(1, at + 1, m):copy_(part.grad)
            end
        end)
        at = at + m
    end
    return ce / n, kl / n, grad
end

local function labelled(labels, ids)
    local rows, wanted = {}, {}
    local list = lc.is_tensor(labels) and labels:totable() or labels
    if type(list[1]) ~= "table" then list = { list } end
    local t = ids:size(2)
    for i = 1, ids:size(1) do
        for j = 2, t do
            if list[i][j] ~= -100 then rows[#rows + 1], wanted[#wanted + 1] = (i - 1) * t + j - 2, list[i][j] end
        end
    end
    return rows, wanted
end

--- Second-stage loss: ce (1) times the next-token loss plus kl (1) times the divergence from the teacher's
--- distribution, over labelled positions (or, with all = true, every position but the last). opts: temperature (1),
--- chunk (rows whose logits are held at once, 256). Returns the loss (a tensor with its gradient) and {ce =, kl =},
--- means over the rows.
function M.distill_loss(student, ids, labels, opts)
    opts = opts or {}
    local how = { ce = opts.ce or 1, kl = opts.kl or 1, temperature = opts.temperature or 1, chunk = opts.chunk or 256 }
    if how.ce == 0 and how.kl == 0 then lc.fail("distill_loss: ce and kl are both 0; there is no loss") end
    ids = student:check_ids(ids)
    local rows, wanted = labelled(opts.all and ids or labels or ids, ids)
    if #rows == 0 then lc.fail("no label to learn from: every label is -100, or the row has a single token") end
    if opts.all and labels then how.ce = 0 end
    local where = { dtype = "i32", device = student.device }
    local index, targets = lc.tensor(rows, where), lc.tensor(wanted, where)
    local y = how.kl ~= 0 and lc.no_grad(function()
        return lc.scope(function()
            local h = student.teacher:forward(ids)
            return h:reshape(-1, h:size(-1)):index_select(1, index)
        end)
    end)
    local h = student:forward(ids)
    local x = h:reshape(-1, h:size(-1)):index_select(1, index)
    how.grad = lc.grad_enabled() and x.requires_grad
    local parts = {}
    local f = lc.custom {
        name = "distill_loss",
        forward = function(ctx, rows_)
            parts.ce, parts.kl, ctx.grad = logit_losses(rows_, y, student.head, targets, how)
            local sum = how.ce * parts.ce + how.kl * parts.kl
            return lc.full({}, sum, { dtype = rows_.dtype == "f64" and "f64" or "f32", device = rows_.device })
        end,
        backward = function(ctx, g) return ctx.grad * (g.dtype ~= ctx.grad.dtype and g:to { dtype = ctx.grad.dtype } or g) end,
    }
    return f(x), parts
end

-- ---- windows drawn smaller ------------------------------------------------------------------------------------------
--- Draws for each hybrid layer, with probability p, one of `sizes` (0: purely linear) as its window in the forwards
--- that follow, while gradients are recorded; evaluation always sees the whole window. p = 0 ends it. Call it once a
--- micro-step. The draws come from the seeded generator, so that a resumed run draws the same.
function M.draw_windows(student, p, sizes)
    sizes = sizes or { 0 }
    local layers = {}
    for _, layer in ipairs(student.layers) do
        local a = layer.student
        if a then
            a.drawn = nil
            if a.window > 0 then layers[#layers + 1] = a end
        end
    end
    if p <= 0 or #layers == 0 then return student end
    local draws = lc.no_grad(lc.scope, function() return lc.rand(#layers, 2, { dtype = "f32", device = "cpu" }):totable() end)
    for i, a in ipairs(layers) do
        if draws[i][1] < p then
            local w = sizes[1 + math.min(#sizes - 1, math.floor(draws[i][2] * #sizes))]
            local sinks = nil
            if w > 0 then sinks = a.sinks end
            a.drawn = setmetatable({ window = w, kind = w > 0 and a.kind or "linear", sinks = sinks or false, drawn = false },
                                   { __index = a })
        end
    end
    return student
end

--- Scales the linear part of every hybrid layer by `share` (above 0, up to 1), for training and evaluation alike.
function M.fade(student, share)
    if not (share > 0 and share <= 1) then lc.fail("fade: a share above 0 and up to 1, got %s", tostring(share)) end
    for _, layer in ipairs(student.layers) do
        if layer.student then layer.student.fade = share < 1 and share or nil end
    end
    return student
end

-- ---- which layers keep their softmax --------------------------------------------------------------------------------
local function held_out_loss(student, rows)
    local sum, count = 0, 0
    for _, r in ipairs(rows) do
        local s, n = student:nll(r.ids or r[1], r.labels or r[2])
        sum, count = sum + s, count + n
    end
    return sum / count
end

--- What each hybrid layer costs: the loss on rows {ids =, labels =} when it alone is linear ("alone", the default) or
--- when it alone keeps softmax ("kept"). Returns a list of {layer =, loss =, cost =}, costliest first: the first ones
--- are those to keep (softmax_layers), and the loss to compare with (the teacher's, or all linear).
function M.rank_layers(student, rows, opts)
    local mode = opts and opts.mode or "alone"
    if mode ~= "alone" and mode ~= "kept" then lc.fail("rank_layers: mode is 'alone' or 'kept', not '%s'", tostring(mode)) end
    local records, out = {}, {}
    for i, layer in ipairs(student.layers) do records[i] = layer.student or false end
    local function with(wanted)
        for i, layer in ipairs(student.layers) do layer.student = wanted(i) and records[i] or nil end
        return held_out_loss(student, rows)
    end
    local base
    local ok, problem = pcall(function()
        base = with(function() return mode == "kept" end)
        for i, a in ipairs(records) do
            if a then
                local loss = with(function(j) return (j == i) == (mode == "alone") end)
                out[#out + 1] = { layer = i, loss = loss, cost = mode == "alone" and loss - base or base - loss }
            end
        end
    end)
    for i, layer in ipairs(student.layers) do layer.student = records[i] or nil end
    if not ok then error(problem, 0) end
    table.sort(out, function(a, b)
        if a.cost ~= b.cost then return a.cost > b.cost end
        return a.layer < b.layer
    end)
    return out, base
end

--- Gives layers (positions from 1, negative from the end) their softmax attention back, for good: as if they had been
--- named in softmax_layers. Before LoRA, which leaves such layers out.
function M.keep_softmax(student, list)
    local kept, n = {}, #student.layers
    for i, layer in ipairs(student.layers) do kept[i] = not layer.student end
    for _, i in ipairs(list) do
        local at = i < 0 and n + 1 + i or i
        if at < 1 or at > n then lc.fail("keep_softmax: there is no layer %s; the model has 1 to %d", tostring(i), n) end
        kept[at] = true
        student.layers[at].student = nil
    end
    local names = {}
    for i = 1, n do
        if kept[i] then names[#names + 1] = i end
    end
    student.settings.softmax_layers = #names > 0 and names or nil
    return student
end

return M
