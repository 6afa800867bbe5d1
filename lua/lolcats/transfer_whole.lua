-- transfer_whole.lua: attention transfer as one graph over all layers, for what cannot be taught layer by layer:
-- adapters that learn in the first stage (an output projection's reaches the losses of all later layers), and, with the
-- quirk "flow", students whose own outputs go on to the next layer. Needs the activations of all layers at once.
local lc = require "lolcats"
local attention = require "lolcats.attention"
local tiles = require "lolcats.attention_tiles"

local M = {}

--- Do a student's gradients cross its layers in the first stage?
function M.needed(student)
    if student.flows then return true end
    for _, p in ipairs(student.lora and student:projections() or {}) do
        if p.lora and p.lora.on and p.lora.a.requires_grad then return true end
    end
    return false
end

-- A layer's loss (nil where it keeps its softmax attention) and the residual stream after it. The target is a constant:
-- what softmax attention makes of this layer's q, k, v, adapters included.
local function layer_step(student, layer, x, ctx, how)
    local normed = student:norm_in(layer, x)
    local q, k, v = student:qkv(layer, normed, ctx)
    local call = { start = ctx.start, sequences = ctx.sequences, pos = ctx.pos, layer = layer.index, hidden = normed,
                   window = layer.window, seen = 0 }
    local y, a = lc.no_grad(attention.softmax, q:detach(), k:detach(), v:detach(), call), layer.student
    local loss, y_pred
    if a and (how.mse ~= 0 or student.flows) then y_pred = attention.hybrid(a, q, k, v, call) end
    if a and how.mse ~= 0 then loss = lc.mse_loss(y_pred, y) * how.mse end
    if a and how.xent ~= 0 then
        local fq, fk = attention.features(a, q, k, call)
        local part = tiles.xent(a, q, k, fq, fk, call) * how.xent
        loss = loss and loss + part or part
    end
    return student:finish(layer, x, student.flows and y_pred or y, ctx), loss
end

--- The layers' parts of the loss as one tensor, after their backward (unless opts.backward is false). x: a function
--- that makes the hidden states before the first layer, or those. how: mse and xent, ready for one layer; last: the
--- last layer that learns.
function M.losses(student, x, opts, ids, how, last)
    local function run()
        local ctx = student:context(ids or x, opts)
        local at, sum, each = type(x) == "function" and x() or x, nil, {}
        for i = 1, #student.layers do each[i] = 0 end
        for i = 1, last do
            local loss
            at, loss = lc.scope(layer_step, student, student.layers[i], at, ctx, how)
            if loss then
                each[i], sum = loss:item(), sum and sum + loss or loss
            end
        end
        if opts.backward ~= false and sum.requires_grad then sum:backward() end
        return each
    end
    local each = lc.scope(opts.backward == false and lc.no_grad or lc.enable_grad, run)
    return lc.tensor(each, { dtype = student.fine, device = student.device })
end

return M
