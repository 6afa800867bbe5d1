-- A feature map of your own: squared ReLU on both half-spaces. `init` makes the parameters of one layer and side,
-- `forward` turns rows into features that must not be negative; gradient, checkpoints and decoding come by
-- themselves.
--   lolcats examples/custom_feature_map.lua          checks the map
--   lolcats recipes/distill_smollm2.lua --map examples/custom_feature_map.lua
local lc = require "lolcats"

local map = lc.feature_map {
    doc = "squared ReLU on both half-spaces",
    init = function(self, heads, dim) self.w = lc.param(lc.eye(dim):expand(heads, dim, dim):clone()) end,
    forward = function(self, x, ctx) -- x [batch, heads, time, dim]
        local h = lc.einsum("b h t d, h d f -> b h t f", x, self.w)
        return lc.cat({ h:relu():square(), (-h):relu():square() }, -1) + 1e-6
    end,
}

if arg and arg[0] and arg[0]:match "custom_feature_map%.lua$" then -- run by itself: is it a good map?
    local verdict = lc.check(map)
    print(verdict)
    if not verdict.ok then os.exit(1) end
end

return map
