-- replay.lua: training steps that a device records once and runs again while their shapes stay: lc.record with inputs that
-- are copied into place, and with what a recording would hide from: other shapes, settings or memory of the weights. Where
-- the device records nothing, or a step cannot be recorded, the step runs as it is.
local lc = require "lolcats"

local M = {}

local SLACK = 2 * 2 ^ 20 -- holes between blocks

local SWITCHES = { "plain_attention", "plain_hybrid", "plain_linear", "plain_loss", "plain_pointwise" }

-- Where the weights, what is trained and the gradients lie, as text; nil when a gradient has no memory yet, or something
-- cannot be recorded: maps computed in Lua, dropout, windows drawn anew for each step.
local function places(model)
    local out = { model.embed:storage_id(), model.head:storage_id(), model.inv_freq:storage_id(), model.stage or "" }
    if model.recomputes then return nil end -- its backward runs Lua
    if model:rotary_varies() then return nil end -- the frequencies of a text of another length lie elsewhere
    if model.own_freq then out[#out + 1] = model.own_freq:storage_id() end
    for _, name in ipairs(SWITCHES) do out[#out + 1] = lc.get_option(name) end
    for _, p in ipairs { model.embed_proj, model.head_proj } do
        local l = p.lora
        if l and l.dropout and l.dropout > 0 then return nil end
        out[#out + 1] = l and l.on and l.scale or "-"
    end
    for _, layer in ipairs(model.layers) do
        for _, p in pairs(layer.proj) do
            local l = p.lora
            if l and l.dropout and l.dropout > 0 then return nil end
            out[#out + 1] = p.weight:storage_id()
            out[#out + 1] = l and l.on and l.scale or "-"
        end
        local a = layer.student
        if a and (a.map.custom or not a.map.fused or a.generic or a.window_only or a.drawn) then return nil end
        for name, x in pairs(a or {}) do
            if type(x) ~= "table" and type(x) ~= "cdata" then out[#out + 1] = name .. tostring(x) end
        end
    end
    for _, p in ipairs(model:trainable()) do
        local g = p.tensor.grad
        if not g then return nil end
        out[#out + 1] = p.tensor:storage_id()
        out[#out + 1] = g:storage_id()
    end
    return table.concat(out, ",")
end

local Step = {}
Step.__index = Step

function Step:drop()
    if self.graph then self.graph:drop() end
    for _, x in pairs(self.inputs) do x:drop() end
end

--- f(inputs) on a model, inputs a table of tensors that f sees as copies of its own on the model's device. It must return
--- tensors alone, touch the host for nothing and depend on nothing but inputs, the model and `key`, a text of every plain
--- number and switch in it. The third call of one kind in a row is recorded. kind: a name; of each a model keeps one.
--- model.records = false: none.
function M.step(model, kind, key, inputs, f)
    local where = model.device ~= "cpu" and model.records ~= false and places(model)
    if not where then return f(inputs) end
    key = key .. "|" .. where
    local names = {}
    for name in pairs(inputs) do names[#names + 1] = name end
    table.sort(names)
    for _, name in ipairs(names) do
        key = ("%s|%s:%s:%s"):format(key, name, inputs[name].dtype, table.concat(inputs[name].shape, "x"))
    end
    model.recorded = model.recorded or {}
    local step = model.recorded[kind]
    if not step or step.key ~= key then
        if step then step:drop() end
        step = setmetatable({ key = key, inputs = {}, calls = 0 }, Step)
        model.recorded[kind] = step
        for name, x in pairs(inputs) do
            step.inputs[name] = lc.keep(lc.empty(x.shape, { dtype = x.dtype, device = model.device }))
        end
    end
    for name, x in pairs(inputs) do lc.no_grad(step.inputs[name].copy_, step.inputs[name], x) end
    step.calls = step.calls + 1
    if step.calls == 2 then
        local function note(room, ...)
            step.room = room
            return ...
        end
        return note(lc.rehearse(model.device, f, step.inputs))
    end
    if step.calls == 3 then -- the products' ways are chosen, and how much memory it takes is known
        lc.record_room(step.room + SLACK)
        local ok, graph, why = pcall(lc.record, model.device, f, step.inputs)
        if not ok and lc.is_error(graph) and graph.code == "EINTR" then error(graph, 0) end
        step.graph, step.why = ok and graph or nil, ok and why or not ok and tostring(graph) or nil
    end
    if not step.graph then return f(step.inputs) end
    step.graph:run()
    return unpack(step.graph.results)
end

--- Forgets what a model's steps have recorded, and gives its memory back.
function M.forget(model)
    for _, step in pairs(model.recorded or {}) do step:drop() end
    model.recorded = nil
end

return M
