-- lora.lua: low-rank adapters on a model's projections, with PEFT's arithmetic and names: y = W x + (alpha / r) B (A
-- x).
local lc = require "lolcats"

local M = {}

local PREFIX = "base_model.model."
local DEFAULT_TARGETS = { "q_proj", "k_proj", "v_proj", "o_proj" }

local function layer_set(model, list)
    local n, set = #model.layers, {}
    if not list then
        for i = 1, n do set[i] = true end
        return set
    end
    for _, i in ipairs(list) do
        local at = i < 0 and n + 1 + i or i
        if at < 1 or at > n then lc.fail("LoRA layers: there is no layer %d; the model has 1 to %d", i, n) end
        set[at] = true
    end
    return set
end

--- Adds adapters to the projections whose name ends in one of `targets`. A is U(-1/sqrt(in), 1/sqrt(in)), B is 0.
--- opts: rank (8), alpha (16), targets, layers (positions from 1; all but kept softmax layers).
function M.add(model, opts)
    opts = opts or {}
    local rank, alpha = opts.rank or opts.r or 8, opts.alpha or 16
    local targets = opts.targets or DEFAULT_TARGETS
    if type(rank) ~= "number" or rank < 1 or rank ~= math.floor(rank) then
        lc.fail("LoRA rank must be a whole number of at least 1, got %s", tostring(rank))
    end
    local set, hits = layer_set(model, opts.layers), {}
    for i, layer in ipairs(model.layers) do
        -- a layer that keeps its softmax attention is not part of what is being linearized
        local wanted = set[i] and (opts.layers or not model.is_student or layer.student)
        for _, target in ipairs(wanted and targets or {}) do
            local p = layer.proj[target]
            if p then
                hits[target] = true
                if p.lora then lc.fail("%s has an adapter already; merge it first", p.name) end
                local out, inp = p.weight:size(1), p.weight:size(2)
                local where = { dtype = model.fine, device = model.device }
                local bound = 1 / math.sqrt(inp)
                p.lora = {
                    a = lc.param(lc.empty({ rank, inp }, where):uniform_(-bound, bound)),
                    b = lc.param(lc.zeros({ out, rank }, where)),
                    scale = alpha / rank, on = true,
                }
                p.lora.a:set_name(PREFIX .. p.name .. ".lora_A.weight")
                p.lora.b:set_name(PREFIX .. p.name .. ".lora_B.weight")
            end
        end
    end
    for _, target in ipairs(targets) do
        if not hits[target] then
            lc.fail("LoRA target '%s' names no projection; there are q_proj, k_proj, v_proj, o_proj, gate_proj, " ..
                    "up_proj, down_proj", tostring(target))
        end
    end
    model.lora = { rank = rank, alpha = alpha, targets = targets, layers = opts.layers }
    return model
end

--- Every adapter tensor as {name=, tensor=}, in layer order; in a layer all A's stand before the B's, so that in a flat
--- buffer the gradients of A's that share their input are one matrix.
function M.parameters(model)
    local out, names = {}, require("lolcats.models.llama").PROJECTIONS
    for _, layer in ipairs(model.layers) do
        for _, side in ipairs { "a", "b" } do
            for _, name in ipairs(names) do
                local p = layer.proj[name]
                if p.lora then
                    local suffix = side == "a" and ".lora_A.weight" or ".lora_B.weight"
                    out[#out + 1] = { name = PREFIX .. p.name .. suffix, tensor = p.lora[side] }
                end
            end
        end
    end
    return out
end

local function apply(model, sign)
    lc.no_grad(function()
        for _, p in ipairs(model:projections()) do
            local l = p.lora
            if l and l.on == (sign > 0) then
                lc.scope(function()
                    local delta = l.b:detach():matmul(l.a:detach())
                    p.weight:add_(delta, sign * l.scale)
                end)
                l.on = sign < 0
            end
        end
    end)
end

--- Adds the adapters into this model's own copy of the weights (another model may share them) and turns them off.
function M.merge(model)
    model:own_weights()
    apply(model, 1)
    return model
end

--- Takes merged adapters out again, up to rounding.
function M.unmerge(model)
    apply(model, -1)
    return model
end

--- Forgets the adapters; merged ones stay in the weights.
function M.drop(model)
    for _, p in ipairs(model:projections()) do p.lora = nil end
    model.lora = nil
    return model
end

M.PREFIX = PREFIX
return M
