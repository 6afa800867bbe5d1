-- samples.lua: inputs for every row of the op table. A sample is a list of arguments as the Lua function takes them; float tensors
-- are made in float64 and converted by the test to whatever dtype it runs. Rows without an entry get theirs from the signature.
local lc = require "lolcats"
local S = {}

local function randn(...) return lc.randn(..., {dtype = "f64"}) end
local function positive(shape) return lc.randn(shape, {dtype = "f64"}):abs() + 0.3 end
local function ints(list) return lc.tensor(list, {dtype = "i32"}) end
S.randn, S.positive, S.ints = randn, positive, ints

-- what the generator makes for a pointwise row: odd sizes, none at all, one element, a dim of size 1, more than a vector of each width
S.unary_shapes = {{3, 5}, {0, 4}, {1}, {}, {2, 3, 37}, {1000}}
S.binary_shapes = {{{3, 5}, {3, 5}}, {{3, 1}, {1, 5}}, {{4, 1, 3}, {3}}, {{}, {7}}, {{0, 3}, {1, 3}}, {{2, 3, 37}, {2, 3, 37}}, {{6, 37}, {}}}

-- rows whose domain is not the whole line: a function from shape to tensor
S.domain = {log = positive, sqrt = positive, rsqrt = positive, reciprocal = positive, pow_scalar = positive, pow = positive,
            div = function(shape) return positive(shape) end}
-- arguments behind the tensors
S.extra = {pow_scalar = {1.7}, clamp = {-0.5, 0.8}, affine = {0.7, -0.2}, elu = {1.3}, softplus = {2, 1.5}}

local function sums(f)
  return function()
    return {{randn {3, 5}}, {randn {2, 3, 4}, {dims = {1, 3}}}, {randn {2, 3, 4}, {dims = {2}, keep = true}}, {randn {5, 1}, {dims = {-1}}},
            {randn {7, 300}, {dims = {-1}}}, {randn {300, 7}, {dims = {1}}}, f and {randn {0, 3}} or nil}
  end
end
local function along(...)
  local more = {...}
  return function()
    local out = {{randn {3, 5}}, {randn {2, 3, 4}, 1}, {randn {2, 3, 4}, 2}, {randn {1, 1}, -1}, {randn {2, 129}, -1}}
    for _, m in ipairs(more) do out[#out + 1] = m() end
    return out
  end
end

S.rows = {
  reshape = function() return {{randn {2, 6}, {3, 4}}, {randn {2, 6}:transpose(1, 2), {-1, 3}}, {randn {0, 6}, {3, 0}}, {randn {1}, {1, 1, 1}}} end,
  expand = function() return {{randn {3, 1}, {3, 4}}, {randn {3}, {2, -1}}, {randn {}, {2, 2}}} end,
  permute = function() return {{randn {2, 3, 4}, {3, 1, 2}}, {randn {5}, {1}}} end,
  transpose = function() return {{randn {2, 3, 4}, 1, -1}} end,
  slice = function() return {{randn {5, 4}, 1, 2, 4}, {randn {5, 4}, -1, 1, 4, 2}, {randn {5}, 1, -3, -1}} end,
  select = function() return {{randn {5, 4}, 1, 2}, {randn {5, 4}, 2, -1}} end,
  unsqueeze = function() return {{randn {3, 2}, 1}, {randn {3, 2}, 3}} end,
  squeeze = function() return {{randn {3, 1, 2}, 2}} end,
  clone = function() return {{randn {3, 4}:transpose(1, 2)}, {randn {0}}} end,
  to = function() return {} end, -- conversions have a test of their own
  cat = function() return {{{randn {2, 3}, randn {1, 3}, randn {4, 3}}, 1}, {{randn {2, 3}, randn {2, 1}:expand(2, 5)}, -1}} end,
  tril = function() return {{randn {4, 4}}, {randn {2, 3, 5}, 1}, {randn {5, 3}, -1}} end,
  sum = sums(true), mean = sums(false), amax = sums(false), amin = sums(false),
  argmax = along(), argmin = along(), cumsum = along(function() return {randn {3, 4, 2}, 2, true} end), softmax = along(), log_softmax = along(),
  logsumexp = along(function() return {randn {3, 4}, 1, true} end),
  count_nonfinite = function() return {{randn {3, 5}}, {lc.tensor({1, 0, -1}, {dtype = "f64"}) / 0}} end,
  sum_squares = function() return {{{randn {3, 5}, randn {7}:slice(1, 2, 6)}}} end,
  embedding = function() return {{randn {7, 5}, ints {{0, 6, 3}, {3, 3, 1}}}, {randn {7, 5}, ints {2}}} end,
  index_select = function() return {{randn {5, 4}, 1, ints {4, 0, 0}}, {randn {5, 4}, 2, ints {1, 3}}} end,
  gather = function() return {{randn {3, 4}, 2, ints {{0, 3}, {1, 1}, {2, 0}}}} end,
  scatter_add = function() return {{randn {3, 4}, 2, ints {{0, 3}, {1, 1}, {2, 0}}, randn {3, 2}}} end,
  where = function() return {{ints {{1, 0, 1}}:expand(2, 3), randn {2, 3}, randn {3}}} end,
  masked_fill = function() return {{randn {2, 3}, ints {{1, 0, 1}}, -2.5}} end,
  matmul = function()
    local wide = {randn {3, 8}, randn {8, 5}, {wide = true}}
    return {wide, {randn {3, 5}, randn {5, 2}}, {randn {2, 3, 5}, randn {5, 4}}, {randn {2, 1, 3, 5}, randn {4, 5, 2}}, {randn {5}, randn {5}},
            {randn {3, 5}, randn {5}}, {randn {5}, randn {5, 2}}, {randn {4, 3}:transpose(1, 2), randn {4, 6}}, {randn {0, 5}, randn {5, 2}},
            {randn {3, 5}, randn {5, 2}, randn {2}, 0.5}, {randn {40, 70}, randn {70, 33}}, {randn {2, 17, 9}, randn {2, 9, 17}}}
  end,
  linear = function()
    return {{randn {3, 5}, randn {4, 5}}, {randn {2, 3, 5}, randn {4, 5}, randn {4}}, {randn {20, 9}, randn {8, 9}, {add = randn {20, 8}, alpha = 0.5}},
            {randn {1, 33}, randn {70, 33}}, {randn {64, 48}, randn {80, 48}, randn {80}}, {randn {0, 5}, randn {4, 5}},
            {randn {1, 64}, randn {70, 64}, randn {70}, {add = randn {1, 70}, alpha = 0.5}}, {randn {3, 256}, randn {5, 256}}, {randn {6, 1, 32}, randn {9, 32}},
            {randn {2, 3, 4, 6}:transpose(2, 3), randn {5, 6}}, {randn {1, 2080}, randn {3, 2080}}, {randn {8}, randn {40, 8}}}
  end,
  projections = function()
    local function adapters(n, r, widths) -- one for each width, nil for 0
      local o = {}
      for i, out in ipairs(widths) do
        local at = i > 1 and i or ""
        if out > 0 then o["a" .. at], o["b" .. at], o["scale" .. at] = randn {r, n}, randn {out, r}, 0.5 * i end
      end
      return o
    end
    local o = adapters(24, 2, {0, 8, 5})
    o.add = randn {2, 3, 16}
    return {{randn {3, 5}, randn {4, 5}, randn {2, 5}, randn {3, 5}}, {randn {6, 16}, randn {8, 16}, randn {8, 16}, randn {3, 16}, adapters(16, 4, {8, 8, 3})},
            {randn {2, 3, 24}, randn {16, 24}, randn {8, 24}, randn {5, 24}, o}, {randn {1, 64}, randn {40, 64}, randn {8, 64}, randn {8, 64}, adapters(64, 8, {40, 8, 8})},
            {randn {0, 5}, randn {4, 5}, randn {2, 5}, randn {3, 5}, adapters(5, 2, {4, 2, 0})}}
  end,
  rms_norm = function() return {{randn {3, 5}, randn {5}}, {randn {2, 3, 64}, randn {64}, 1e-6}, {randn {0, 5}, randn {5}}} end,
  rope_table = function() return {{ints {0, 1, 5, 20}, positive {4}}, {ints {{0, 1}, {7, 8}}, positive {3}}} end,
  rope = function()
    local cos, sin = lc.rope_table(ints {0, 1, 2}, positive {4})
    local frozen = {[2] = true, [3] = true} -- tables have no gradient
    return {{randn {2, 3, 3, 8}, cos, sin, frozen = frozen}, {randn {2, 3, 3, 8}, cos, sin, true, frozen = frozen},
            {randn {2, 3, 4, 8}:transpose(2, 3), cos, sin, frozen = frozen}}
  end,
  rope_pair = function()
    local cos, sin = lc.rope_table(ints {0, 1, 2}, positive {4})
    local frozen = {[3] = true, [4] = true}
    return {{randn {2, 3, 3, 8}, randn {2, 1, 3, 8}, cos, sin, frozen = frozen}, {randn {2, 2, 3, 8}, randn {2, 3, 4, 8}:transpose(2, 3):narrow(3, 1, 3), cos, sin, true, frozen = frozen}}
  end,
  attention = function()
    return {{randn {1, 2, 7, 8}, randn {1, 1, 7, 8}, randn {1, 1, 7, 8}}, {randn {2, 4, 5, 8}, randn {2, 2, 9, 8}, randn {2, 2, 9, 8}},
            {randn {1, 2, 20, 4}, randn {1, 2, 20, 4}, randn {1, 2, 20, 4}, {window = 6}}, {randn {1, 1, 1, 4}, randn {1, 1, 1, 4}, randn {1, 1, 1, 4}},
            {randn {2, 1, 6, 4}, randn {2, 1, 6, 4}, randn {2, 1, 6, 4}, {start = ints {0, 2}, scale = 0.3}}}
  end,
  hybrid_attention = function()
    local function case(t, h, g, d, f, o) return {randn {1, h, t, d}, randn {1, g, t, d}, randn {1, g, t, d}, randn {h, d, f}, randn {h, d, f}, o} end
    local function o(t) t.factors = t.factors or randn {1, 2, 1, 1} return t end
    return {case(11, 2, 1, 6, 3, o {map = "softmax_dim", window = 4}), case(11, 2, 2, 6, 3, o {map = "softmax_dim", window = 3, kind = "sliding", affine = true}),
            case(9, 2, 1, 4, 5, o {map = "relu", window = 2, bq = randn {2}, bk = randn {2}}), case(9, 2, 1, 4, 4, o {map = "pos_elu", window = 4, skip = true}),
            case(9, 2, 1, 4, 3, o {map = "exp_dim", window = 4, full = false}), case(7, 2, 1, 4, 3, {map = "softmax_dim", window = 0}),
            {randn {1, 2, 9, 4}, randn {1, 1, 9, 4}, randn {1, 1, 9, 4}, positive {1, 2, 9, 5}, positive {1, 2, 9, 5}, o {map = "none", window = 4}},
            case(1, 2, 1, 4, 3, o {map = "softmax_dim", window = 4}), case(70, 2, 1, 8, 4, o {map = "softmax_dim", window = 16})}
  end,
  mse_loss = function() return {{randn {3, 5}, randn {3, 5}}, {randn {1}, randn {1}}} end,
  mse_loss_slope = function() return {{randn {3, 5}, randn {3, 5}}, {randn {2, 3, 40}, randn {2, 3, 40}, 0.25}} end,
  cross_entropy = function() return {{randn {4, 9}, ints {0, 8, -100, 3}}, {randn {2, 3}, ints {-100, 1}}} end,
  linear_cross_entropy = function() return {{randn {4, 6}, randn {9, 6}, ints {0, 8, -100, 3}, frozen = {[2] = true}, visible = 1}} end,
}

-- changed in place: compared after the call; no gradient
S.inplace = {
  copy_ = function() return {{randn {3, 4}, randn {4}}, {randn {4, 3}:transpose(1, 2), randn {3, 4}}} end,
  fill_ = function() return {{randn {3, 4}, 1.5}} end,
  arange_ = function() return {{randn {3, 4}, 2, 0.5}} end,
  eye_ = function() return {{randn {3, 4}}} end,
  addmm_ = function() return {{randn {4, 3}, randn {4, 7}, randn {7, 3}, 0.5}, {randn {40, 33}, randn {70, 40}:transpose(1, 2), randn {70, 33}}} end,
  add_ = function() return {{randn {3, 4}, randn {4}, 0.5}, {randn {3, 4}, randn {3, 4}}} end,
  scale_ = function() return {{randn {3, 4}, 0.3}, {randn {5}, lc.tensor(0.25, {dtype = "f64"})}} end,
  adamw_ = function()
    return {{randn {9}, randn {9}, randn {9}, positive {9}, 0.01, 3, {weight_decay = 0.1}}, {randn {9}, randn {9}, randn {9}, positive {9}, 0.01, 1, {decoupled = false, weight_decay = 0.1}}}
  end,
  sgd_ = function() return {{randn {9}, randn {9}, randn {9}, 0.1, 2, {momentum = 0.9, nesterov = true}}, {randn {9}, randn {9}, nil, 0.1, 1}} end,
}

S.random = {uniform_ = {-1, 2}, normal_ = {0.5, 2}}

return S
