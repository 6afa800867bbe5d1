-- compat.lua: the reference's terrace as it is (compat = "reference"): weights, outputs, both losses and the gradients
-- of their sum in the quadratic form, and what decoding token by token gives; rotary frequencies in float64, float32
-- and rounded to bfloat16.
local lc = require "lolcats"
local files = require "lolcats.files"
local maps = require "lolcats.feature_map"
local attention = require "lolcats.attention"
local rope = require "lolcats.models.rope"

local function student(e, t, dtype, noise)
    local map = maps.builtin(e.feature_map, { full = e.fullspace, bias = e.bias, skip = e.skip_connection,
                                              feature_dim = e.feature_dim })
    local function leaf(x)
        x = x:to(dtype)
        return (noise and noise(x) or x:clone()):requires_grad_()
    end
    local a = { map = map, kind = "terrace", window = e.window, affine = e.affine_attention_factors, compat = true }
    for _, side in ipairs { "q", "k" } do
        local inst = setmetatable({}, map.meta)
        inst.layer = leaf(t["w_" .. side])
        if e.bias then inst.bias = leaf(t["bias_" .. side]) end
        a["f" .. side] = inst
    end
    a.factors = leaf(t.window_factors)
    return a
end

local function cross_entropy(a_pred, a_true)
    local n = a_true:size(-1)
    return (a_pred:clamp({ min = 1e-12 }):log():log_softmax(-1) * a_true):sum() * (-n / a_true:numel())
end

-- One chunk of `first` positions, then one by one.
local function decoded(a, q, k, v, first)
    local how = { dtype = q.dtype, device = q.device }
    local state = attention.hybrid_state({ student = a, index = 1 }, q:size(1), q:size(2), k:size(2), q:size(4), how)
    local rows, at = {}, 1
    while at <= q:size(3) do
        local n = at == 1 and first or 1
        local function part(x) return x:narrow(3, at, n) end
        local pos = lc.full({ q:size(1) }, at - 1, { dtype = "i32", device = q.device })
        rows[#rows + 1] = lc.no_grad(attention.hybrid, a, part(q), part(k), part(v),
                                     { seen = at - 1, state = state, pos_tensor = pos })
        at = at + n
    end
    return lc.cat(rows, 3)
end

local function run(c, e, t, dtype, tol, noise)
    local function input(x) return noise and noise(x:to(dtype)) or x:to(dtype) end
    local q, k, v = input(t.q), input(t.k), input(t.v)
    local a, ctx = student(e, t, dtype, noise), { seen = 0 }
    local fq, fk = attention.features(a, q, k, ctx)
    local y_true, a_true = attention.quadratic_softmax(q, k, v)
    c.close("y_true", y_true, t.y_true, tol.out, tol.floor)
    c.close("y_pred, by the student's attention", lc.no_grad(attention.hybrid, a, q, k, v, ctx), t.y_pred, tol.out,
            tol.floor)
    local y, w = attention.quadratic(a, q, k, v, fq, fk)
    c.close("y_pred", y, t.y_pred, tol.out, tol.floor)
    c.close("a_pred", w, t.a_pred, tol.out, tol.floor)
    local mse, xent = lc.mse_loss(y, y_true), cross_entropy(w, a_true)
    c.close("loss_mse", mse, t.loss_mse, tol.loss, tol.floor)
    c.close("loss_xent", xent, t.loss_xent, tol.loss, tol.floor)
    ;(mse * 1000 + xent):backward()
    local params = { w_q = a.fq.layer, w_k = a.fk.layer, bias_q = a.fq.bias, bias_k = a.fk.bias,
                     window_factors = a.factors }
    for name, p in pairs(params) do
        local want = t["grad_" .. name]
        if want then c.close("grad_" .. name, p.grad or lc.zeros_like(p), want, tol.grad, tol.floor) end
    end
    c.close("y_decode", decoded(a, q, k, v, 1), t.y_decode, tol.out, tol.floor)
    -- a text read at once up to some place, and token by token from there
    local l = q:size(3)
    local first = math.ceil(l / 2)
    if first < l then
        local both = decoded(a, q, k, v, first)
        c.close("y_decode after a prefill", both:narrow(3, first + 1, l - first),
                t.y_decode:narrow(3, first + 1, l - first),
                tol.out, tol.floor)
    end
end

-- Largest relative difference of two tables of numbers.
local function relative(got, want)
    local worst = 0
    for i = 1, #want do worst = math.max(worst, math.abs(got[i] / want[i] - 1)) end
    return worst
end

-- Is a float32 value so near the middle of two bfloat16 that its rounding may fall either way?
local function on_the_edge(x)
    local _, exponent = math.frexp(x)
    local steps = x / 2 ^ (exponent - 8) -- in units of bfloat16's last place
    return math.abs(steps - math.floor(steps) - 0.5) * 2 ^ (exponent - 8) < 2e-6 * x
end

local function rope_case(c, e)
    if e.rope_scaling == files.null then e.rope_scaling = nil end
    local got = rope.inv_freq { head_dim = e.head_dim, rope_theta = e.rope_theta, rope_scaling = e.rope_scaling,
                                max_position_embeddings = 2048 }
    c.check("count", #got == #e.inv_freq_f64, #got)
    c.near("float64", relative(got, e.inv_freq_f64), 0, 1e-12)
    local f32 = lc.tensor(got, { dtype = "f32", device = "cpu" }):totable()
    c.near("float32", relative(f32, e.inv_freq_f32), 0, 1e-6)
    for i, x in ipairs(rope.round_bf16(got)) do
        if not on_the_edge(e.inv_freq_f32[i]) then
            c.check("bfloat16 " .. i, x == e.inv_freq_bf16[i], ("%.9g, expected %.9g"):format(x, e.inv_freq_bf16[i]))
        end
    end
end

return function(dir, T)
    for _, e in ipairs(files.read_json(dir .. "/index.json").files) do
        for _, dtype in ipairs(T.DTYPES) do
            T.dtype_case("compat/" .. e.file, dtype, function(c, kind, tol, noise)
                run(c, e, T.tensors(dir .. "/" .. e.file), kind, tol, noise)
            end)
        end
    end
    if not files.exists(dir .. "/rope.json") then return end
    for i, e in ipairs(files.read_json(dir .. "/rope.json").cases) do
        T.case(("compat/rope %d: head_dim %d, base %g"):format(i, e.head_dim, e.rope_theta),
               function(c) rope_case(c, e) end)
    end
end
