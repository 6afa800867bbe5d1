-- maps/kernels.lua: what a built-in feature map learns: x [b, h, t, d] -> y [b, h, t, f], per head. Names and start
-- values are the reference's (untied_head_einsum, untied_head_adapter); a matrix shared by all heads and no learned
-- kernel at all are there too. An instance of a map holds the parameters: layer [h, d, f], bias [1, h, 1, 1].
local lc = require "lolcats"

local M = {}

local function kaiming(shape, fan_in, where)
    local bound = math.sqrt(6 / fan_in)
    return lc.param(lc.empty(shape, where):uniform_(-bound, bound))
end

local function per_head(x, heads) -- [d, f] -> [heads, d, f], a copy each
    return lc.param(x:unsqueeze(1):expand(heads, x:size(1), x:size(2)):clone())
end

local function start_value(map, heads, dim, f, where)
    local start = map.start
    if start == "identity" or start == "zero" then
        -- with a skip connection the identity is already there
        return per_head((map.skip or start == "zero") and lc.zeros({ dim, f }, where) or lc.eye(dim, f, where), heads)
    elseif start == "kaiming" then
        return kaiming({ heads, dim, f }, dim * f, where) -- the fan-in that PyTorch takes of a 3-d weight
    elseif start == "normal" then
        return lc.param(lc.empty({ heads, dim, f }, where):normal_())
    end
    lc.fail("feature map '%s': init is 'identity', 'zero', 'kaiming' or 'normal', not '%s'", map.name, tostring(start))
end

-- ---- one matrix a head, or one for all ------------------------------------------------------------------------------
local einsum = {}

function einsum.init(self, map, heads, dim, f, where)
    if map.skip and f ~= dim then
        lc.fail("feature map '%s': a skip connection needs feature_dim = head_dim (%d), got %d", map.name, dim, f)
    end
    local n = map.kernel == "tied" and 1 or heads
    self.layer = start_value(map, n, dim, f, where)
    if map.with_bias == "feature" then
        self.bias = kaiming({ 1, n, 1, f }, n * f, where)
    elseif map.with_bias then
        self.bias = kaiming({ 1, n, 1, 1 }, n, where)
    end
end

function einsum.apply(self, map, x)
    local y = x:matmul(self.layer)
    local bias = self:effective_bias()
    if bias then y = y + bias end
    if map.skip then y = y + x end
    return y
end

-- ---- x plus a small network -----------------------------------------------------------------------------------------
local adapter = {}

-- The reference starts all four at zero, where only bias1 ever gets a gradient: init = "zero" does that. Otherwise the
-- first layer starts at random, so that the network is still zero but learns.
function adapter.init(self, map, heads, dim, f, where)
    if f ~= dim then lc.fail("feature map '%s': the adapter needs feature_dim = head_dim (%d), got %d", map.name, dim, f) end
    local hidden = map.hidden_dim or 64
    if map.start == "zero" then
        self.layer0 = lc.param(lc.zeros({ heads, dim, hidden }, where))
    else
        self.layer0 = kaiming({ heads, dim, hidden }, dim, where)
    end
    self.layer1 = lc.param(lc.zeros({ heads, hidden, f }, where))
    self.bias0 = lc.param(lc.zeros({ 1, heads, 1, hidden }, where))
    self.bias1 = lc.param(lc.zeros({ 1, heads, 1, f }, where))
end

function adapter.apply(self, _, x)
    return x + (x:matmul(self.layer0) + self.bias0):relu():matmul(self.layer1) + self.bias1
end

local none = { init = function() end, apply = function(_, _, x) return x end }

local BY_NAME = { untied = einsum, tied = einsum, adapter = adapter, none = none }
local ALIASES = { untied_head_einsum = "untied", tied_head_einsum = "tied", untied_head_adapter = "adapter" }

--- The short name of a kernel: untied, tied, adapter or none.
function M.name(kernel, of)
    local short = ALIASES[kernel] or kernel
    if not BY_NAME[short] then
        lc.fail("feature map '%s': kernel is untied (untied_head_einsum), tied, adapter (untied_head_adapter) or none, not '%s'",
                of, tostring(kernel))
    end
    return short
end

--- Learned outputs a head.
function M.outputs(map, dim)
    if map.kernel == "none" then return dim end
    if map.feature_dim then return map.feature_dim end
    if map.kernel == "adapter" then return dim end
    return map.half and math.max(1, math.floor(dim / 2)) or map.few and math.min(map.few, dim) or dim
end

function M.init(self, map, heads, dim, f, where) BY_NAME[map.kernel].init(self, map, heads, dim, f, where) end
function M.apply(self, map, x) return BY_NAME[map.kernel].apply(self, map, x) end

return M
