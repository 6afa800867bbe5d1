-- maps/activations.lua: the built-in feature maps after their learned kernel: y [b, h, t, f] -> features [b, h, t, F].
-- Each row of the table M has forward(y, self, map, ctx) and what is special about it: op (the name under which the
-- fused attention computes it), signed (features may be negative; then the weights q . k must not be), init (tensors of
-- an instance beside its kernel), defaults, and the paper it is from.
local lc = require "lolcats"

local M = {}

local FEATURE_EPS = 1e-12

local function clamped(x, map) return x:clamp { min = map.feature_eps or FEATURE_EPS } end

-- ---- the reference's ------------------------------------------------------------------------------------------------
local function softmax_dim(x, full)
    if not full then return x:softmax(-1) end
    return lc.cat({ x:softmax(-1), (-x):softmax(-1) }, -1)
end

local function exp_dim(x, full)
    local hi = (x - x:amax(-1, { keep = true })):exp()
    if not full then return hi end
    return lc.cat({ hi, (x:amin(-1, { keep = true }) - x):exp() }, -1)
end

local SOFTMAX = { op = "softmax_dim", doubles = true,
                  forward = function(x, _, map) return clamped(softmax_dim(x, map.full), map) end }
local EXP = { op = "exp_dim", doubles = true,
              forward = function(x, _, map) return clamped(exp_dim(x, map.full), map) end }
-- 1 + elu(x) without taking 1 from an exponential and adding it again
local ELU = {
    op = "pos_elu",
    forward = function(x, _, map) return clamped(x:clamp({ max = 0 }):exp() + x:relu(), map) end,
}
local RELU = { op = "relu", forward = function(x, _, map) return clamped(x:relu(), map) end }

local function row(base, more)
    local out = {}
    for k, v in pairs(base) do out[k] = v end
    for k, v in pairs(more) do out[k] = v end
    return out
end

M.hedgehog = row(SOFTMAX, { half = true, doc = "softmax of xW and of -xW; feature_dim defaults to head_dim / 2" })
M.softmax_dim = row(SOFTMAX, { doc = "softmax of xW, and of -xW when full" })
M.exp_dim = row(EXP, { doc = "exp(xW - max), and exp(min - xW) when full" })
M.pos_elu = row(ELU, { doc = "1 + elu(xW)" })
M.relu = row(RELU, { doc = "relu(xW)" })
M.t2r = row(RELU, { bias = true, doc = "relu(xW + b)" })
M.none = { doc = "xW itself, limited to what is above 0", forward = function(x, _, map) return clamped(x, map) end }

-- ---- from the wider field -------------------------------------------------------------------------------------------
-- Random directions, orthogonal in blocks of d, with the lengths of normal vectors: [d, m].
local function orthogonal(m, d)
    local normal = lc.randn({ m, d }, { dtype = "f64" }):totable()
    local out, basis = {}, {}
    for i = 1, m do
        local v = {}
        for j = 1, d do v[j] = normal[i][j] end
        local function length()
            local s = 0
            for j = 1, d do s = s + v[j] * v[j] end
            return math.sqrt(s)
        end
        local whole = length()
        if #basis == d then basis = {} end
        for _ = 1, 2 do -- twice: the first pass leaves rounding behind
            for _, u in ipairs(basis) do
                local dot = 0
                for j = 1, d do dot = dot + u[j] * v[j] end
                for j = 1, d do v[j] = v[j] - dot * u[j] end
            end
        end
        local left = length()
        local unit = {}
        for j = 1, d do unit[j] = v[j] / left end
        basis[#basis + 1] = unit
        local r = {}
        for j = 1, d do r[j] = unit[j] * whole end
        out[i] = r
    end
    return out
end

M.performer = {
    doc = "Performer's FAVOR+ (positive orthogonal random features of exp(q.k / sqrt(d))); feature_dim of them, " ..
        "default head_dim",
    kernel = "none",
    init = function(self, map, _, f, where)
        local m = map.feature_dim or f
        self.omega = lc.tensor(orthogonal(m, f), where):transpose(1, 2):contiguous()
    end,
    buffers = { omega = true },
    forward = function(x, self, _, ctx)
        local f = x:size(-1)
        x = x * f ^ -0.25
        local e = x:matmul(self.omega) - x:square():sum(-1, { keep = true }) * 0.5
        -- a constant a query cancels beside nothing but its own window; keys must keep their sizes
        if ctx.side == "q" then e = e - e:amax(-1, { keep = true }) end
        return e:clamp({ max = 40 }):exp() * self.omega:size(2) ^ -0.5 + 1e-6
    end,
}

M.dpfp = {
    doc = "DPFP (Schlag et al.): products of relu(x), relu(-x) with themselves shifted by 1 to nu (map_options.nu, 3)",
    kernel = "none",
    forward = function(x, self, map)
        local nu, parts = self.options.nu or 3, {}
        local two = lc.cat({ x:relu(), (-x):relu() }, -1)
        local n = two:size(-1)
        for i = 1, nu do
            local s = i % n
            local rolled = s == 0 and two or lc.cat({ two:narrow(-1, n - s + 1, s), two:narrow(-1, 1, n - s) }, -1)
            parts[i] = two * rolled
        end
        return clamped(#parts == 1 and parts[1] or lc.cat(parts, -1), map)
    end,
}

M.cosformer = {
    doc = "cosFormer: relu(x) times cos and sin of pi/2 * position / max_length (map_options.max_length, 4096; " ..
        "later positions count as it)",
    kernel = "none",
    forward = function(x, self, map, ctx)
        local top, t = self.options.max_length or 4096, x:size(3)
        local pos = ctx.pos:to { dtype = x.dtype }
        pos = pos:dim() == 1 and pos:reshape(1, 1, t, 1) or pos:reshape(x:size(1), 1, t, 1)
        local angle = pos:clamp { max = top } * (math.pi / 2 / top)
        local y = x:relu()
        return clamped(lc.cat({ y * angle:cos(), y * angle:sin() }, -1), map)
    end,
}

M.taylor = {
    doc = "Based's second-order Taylor map: q.k counts 1 + s + s^2 / 2, s = q.k / sqrt(f); feature_dim f " ..
        "defaults to 16",
    few = 16, signed = true,
    forward = function(x)
        local s = x.shape
        local f = s[4]
        x = x * f ^ -0.25
        local one = lc.ones({ s[1], s[2], s[3], 1 }, { dtype = x.dtype, device = x.device })
        local outer = (x:unsqueeze(-1) * x:unsqueeze(-2)):reshape(s[1], s[2], s[3], f * f)
        return lc.cat({ one, x, outer * 0.5 ^ 0.5 }, -1)
    end,
}

M.l2 = {
    doc = "identity with L2 norm: q.k counts 1 + cos of their angle; full = false: the cosine alone, which may " ..
        "be negative",
    kernel = "none", signed = true,
    forward = function(x, _, map)
        local s = x.shape
        local unit = x * (x:square():sum(-1, { keep = true }) + 1e-12):rsqrt()
        if not map.full then return unit end
        return lc.cat({ lc.ones({ s[1], s[2], s[3], 1 }, { dtype = x.dtype, device = x.device }), unit }, -1)
    end,
}

-- ---- hedgehog's features forget how long q and k are ----------------------------------------------------------------
local function length(x) return (x:square():mean(-1, { keep = true }) + 1e-12):sqrt() end

M.hedgehog_norm = {
    doc = "hedgehog times the length of x over sqrt(head_dim): the norm is kept",
    half = true, wants_x = true,
    forward = function(y, _, map, _, x) return clamped(softmax_dim(y, map.full) * length(x), map) end,
}

M.hedgehog_gated = {
    doc = "hedgehog times exp(x.g + n |x| / sqrt(head_dim)), g and n learned a head from 0: equals hedgehog at " ..
        "the start",
    half = true, wants_x = true,
    init = function(self, _, heads, _, where, dim)
        self.gate = lc.param(lc.zeros({ heads, dim, 1 }, where))
        self.norm = lc.param(lc.zeros({ 1, heads, 1, 1 }, where))
    end,
    forward = function(y, self, map, _, x)
        local e = (x:matmul(self.gate) + self.norm * length(x)):clamp { min = -8, max = 8 }
        return clamped(softmax_dim(y, map.full) * e:exp(), map)
    end,
}

return { rows = M, softmax_dim = softmax_dim, exp_dim = exp_dim, FEATURE_EPS = FEATURE_EPS }
