-- adafactor.lua: the update of lc.adafactor, by the arithmetic of Hugging Face's Adafactor with a given learning rate
-- (relative_step off): second moments of a matrix kept as one row and one column, updates clipped by their root mean
-- square, and steps scaled by that of the parameter.
local lc = require "lolcats"

local M = {}

local function rms(x) return math.sqrt(x:square():sum():item() / x:numel()) end

local function without(shape, from_end)
    local out = {}
    for i, n in ipairs(shape) do
        if i ~= #shape + 1 - from_end then out[#out + 1] = n end
    end
    return out
end

--- State tensors of an attached optimizer, by name: for a parameter of two or more dims its row and column, else its
--- full second moment; the first moment when beta1 is set.
function M.attach(self)
    self.state = {}
    for i, p in ipairs(self.params) do
        local shape, where = p.tensor.shape,
            { dtype = p.tensor.dtype == "f64" and "f64" or "f32", device = p.tensor.device }
        local function make(s) return lc.keep(lc.zeros(s, where)) end
        local s = #shape >= 2 and { row = make(without(shape, 1)), col = make(without(shape, 2)) } or
            { full = make(shape) }
        if self.args.beta1 then s.first = make(shape) end
        self.state[i] = s
    end
end

function M.tensors(self)
    local out = {}
    for i, p in ipairs(self.params) do
        for kind, x in pairs(self.state[i]) do out[kind .. "." .. p.name] = x end
    end
    return out
end

local function update(p, g, s, o, lr, step)
    local w = p:detach()
    if g.dtype ~= w.dtype and w.dtype == "f64" then g = g:to(w.dtype) end
    if o.scale_parameter then lr = lr * math.max(o.eps[2], rms(w:to(g.dtype))) end
    local beta2 = 1 - step ^ o.decay_rate
    local sq = g:square() + o.eps[1]
    local u
    if s.row then
        s.row:scale_(beta2)
        s.row:add_(sq:mean(-1), 1 - beta2)
        s.col:scale_(beta2)
        s.col:add_(sq:mean(-2), 1 - beta2)
        local r = (s.row / s.row:mean(-1, { keep = true })):rsqrt():unsqueeze(-1)
        u = r * s.col:rsqrt():unsqueeze(-2) * g
    else
        s.full:scale_(beta2)
        s.full:add_(sq, 1 - beta2)
        u = s.full:rsqrt() * g
    end
    u = u * (lr / math.max(1, rms(u) / o.clip_threshold))
    if s.first then
        s.first:scale_(o.beta1)
        s.first:add_(u, 1 - o.beta1)
        u = s.first
    end
    if o.weight_decay ~= 0 then w:scale_(1 - o.weight_decay * lr) end
    w:add_(u, -1)
end

--- One update of every parameter.
function M.step(self, _, lr, step)
    for i, p in ipairs(self.params) do
        lc.no_grad(lc.scope, update, p.tensor, p.tensor.grad, self.state[i], self.args, lr, step)
    end
end

return M
