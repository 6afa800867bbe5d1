-- decode.lua: decoding, one token a row and step on a carried state. Where the device records graphs, and every layer has a
-- state of constant size, the second step is recorded and later ones are one call each.
local lc = require "lolcats"

local M = {}

local Decoder = {}
Decoder.__index = Decoder

--- Steps of `model` on `state`, whose positions are all one. ids [b, 1] (i32) is read by each step where it lies: write the
--- next tokens there. finish(x) makes what is wanted of the last hidden states x [b, H]; it may write ids. The weights must stay
--- where they are as long as this is used.
function M.new(model, state, ids, finish)
    local fits = model.device and model.device ~= "cpu" and not state.as_teacher
    for _, s in ipairs(fits and state.layers or {}) do fits = fits and s.state ~= nil end
    fits = fits and not model:rotary_varies()
    return setmetatable({ model = model, state = state, ids = ids, finish = finish, steps = 0, records = fits }, Decoder)
end

local function whole(self, fixed)
    local x = self.model:forward(self.ids, { state = self.state, fixed = fixed, teacher = self.state.as_teacher })
    return self.finish(x:select(2, -1))
end

--- One step; returns what finish returned. From a recorded step these are the same tensors each time, written anew.
function Decoder:step()
    self.steps = self.steps + 1
    if self.records and self.steps == 2 then -- the first one has chosen the products' ways and found its memory
        local ok, graph = pcall(lc.record, self.model.device, whole, self, true)
        if not ok and lc.is_error(graph) and graph.code == "EINTR" then error(graph, 0) end
        self.graph = ok and graph or nil
    end
    if not self.graph then return lc.no_grad(lc.scope, whole, self) end
    self.graph:run()
    self.model:advance(self.state, 1)
    return unpack(self.graph.results)
end

return M
