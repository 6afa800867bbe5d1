-- nn.lua: what modules share: token ids from whatever a caller holds, the products of a layer with their adapters,
-- and the flat buffers that hold all trained parameters, their gradients and their moments.
local lc = require "lolcats"
local tensors = require "lolcats.core.tensor"

local M = {}

--- Token ids as an int32 tensor [b, t]: a table of ids, a table of such tables of one length, or a tensor [t] or [b,
--- t].
function M.ids(ids, device)
    if type(ids) == "table" and not lc.is_tensor(ids) then
        local rows = type(ids[1]) == "table" and ids or { ids }
        local n = #rows[1]
        if n == 0 then lc.fail("no token ids given: the text is empty") end
        for i, row in ipairs(rows) do
            if #row ~= n then
                lc.fail("row %d of the token ids has %d ids, row 1 has %d; rows must be of one length", i, #row, n)
            end
        end
        return lc.tensor(rows, { dtype = "i32", device = device })
    end
    if not lc.is_tensor(ids) then lc.fail("token ids: expected a table or a tensor, got a %s", type(ids)) end
    local x = ids
    if x.dtype ~= "i32" then x = x:to { dtype = "i32" } end
    if device and x.device ~= device then x = x:to { device = device } end
    if x:dim() == 1 then x = x:reshape(1, -1) end
    if x:dim() ~= 2 or x:numel() == 0 then
        lc.fail("token ids: expected shape [t] or [b, t] with t > 0, got [%s]", table.concat(ids.shape, ", "))
    end
    return x
end

local function adapter(p)
    local l = p and p.lora
    if l and l.on then return l end
end

-- Adds a projection's bias, kept in f32 beside halves.
local function biased(y, p)
    if not p or not p.bias then return y end
    return y + (p.bias.dtype == y.dtype and p.bias or p.bias:to(y.dtype))
end

-- Dropout of what an adapter reads, while gradients are recorded.
local function drops(l) return l and l.dropout and lc.grad_enabled() end

local function dropped(x, p, l, add)
    local low = lc.linear((lc.dropout(x, l.dropout)), l.a:to(x.dtype))
    return lc.linear(x, p.weight, p.bias, add) + lc.linear(low, l.b:to(x.dtype)) * l.scale
end

--- x W^T of a projection {weight=, bias=, lora=}, plus add; an adapter rides on the same sums, so it costs no extra
--- pass over y.
function M.project(x, p, add)
    local l = adapter(p)
    if not l then return lc.linear(x, p.weight, p.bias, add) end
    if drops(l) then return dropped(x, p, l, add) end
    return biased((lc.projections(x, p.weight, nil, nil, l.a, nil, nil, l.b, nil, nil, add, l.scale)), p)
end

local NONE = { scale = 1 }

--- Two or three projections of one x. Where a gradient flows back, or an adapter is on, they are one op: the adapters'
--- A's become one product, and the gradients for x are summed where they are made.
function M.project_all(x, p, p2, p3)
    local l, l2, l3 = adapter(p), adapter(p2), adapter(p3)
    if not (l or l2 or l3) and not (lc.grad_enabled() and x.requires_grad) or drops(l) or drops(l2) or drops(l3) then
        return M.project(x, p), M.project(x, p2), p3 and M.project(x, p3)
    end
    l, l2, l3 = l or NONE, l2 or NONE, l3 or NONE
    local y, y2, y3 = lc.projections(x, p.weight, p2.weight, p3 and p3.weight, l.a, l2.a, l3.a, l.b, l2.b, l3.b, nil,
                                     l.scale, l2.scale, l3.scale)
    return biased(y, p), biased(y2, p2), biased(y3, p3)
end

--- Normally distributed weights for a model made from nothing.
function M.normal_(x, std) return x:normal_(0, std) end

-- ---- flat buffers ---------------------------------------------------------------------------------------------------
local ALIGN = 16 -- elements; a parameter starts on a cache line

local Flat = {}
Flat.__index = Flat

--- Moves parameters (a list of {name=, tensor=}) into one buffer and their gradients into another, so that one call
--- clips, zeroes and updates all. Fields: data, grad, m, v (1-d tensors of one length, f32 unless the data are f64),
--- params, n (elements that count). The gaps between parameters hold zeros in all four.
function M.flatten(params, opts)
    opts = opts or {}
    if #params == 0 then lc.fail("there is nothing to train: no parameter requires a gradient") end
    local at, places = 0, {}
    local dtype, device = params[1].tensor.dtype, params[1].tensor.device
    local count = 0
    for i, p in ipairs(params) do
        local t = p.tensor
        if t.dtype ~= dtype or t.device ~= device then
            lc.fail("parameters of one optimizer must share dtype and device: %s is %s on %s, %s is %s on %s",
                    params[1].name, dtype, device, p.name, t.dtype, t.device)
        end
        places[i] = at
        count = count + t:numel()
        at = at + math.ceil(t:numel() / ALIGN) * ALIGN
    end
    local flat = setmetatable({ params = params, n = count, size = at, step = 0 }, Flat)
    local function buffer(kind) return lc.keep(lc.zeros({ at }, { dtype = kind, device = device })) end
    local fine = dtype == "f64" and "f64" or "f32"
    flat.data, flat.grad = buffer(dtype), buffer(fine)
    flat.m, flat.v = buffer(fine), buffer(fine)
    lc.no_grad(function()
        lc.scope(function()
            for i, p in ipairs(params) do
                local t, n = p.tensor, p.tensor:numel()
                local view = flat.data:narrow(1, places[i] + 1, n):reshape(t.shape)
                view:copy_(t)
                tensors.set_data(t, view)
                tensors.set_grad(t, flat.grad:narrow(1, places[i] + 1, n):reshape(t.shape))
            end
        end)
    end)
    return flat
end

function Flat:zero_grad() self.grad:zero_() end

--- The 2-norm of all gradients, as a number.
function Flat:grad_norm()
    return lc.scope(function() return math.sqrt(lc.sum_squares { self.grad }:item()) end)
end

return M
