-- attention.lua: single attentions. The quadratic form gives features, weights, both losses and the gradients of
-- their sum; the fused op, with the map inside and on ready features, is held against the same outputs, and its
-- gradients against those of the quadratic form for the squared error alone.
local lc = require "lolcats"
local files = require "lolcats.files"
local maps = require "lolcats.feature_map"
local attention = require "lolcats.attention"
local tiles = require "lolcats.attention_tiles"

-- The attention record of a case with fresh parameters; noise, where given, moves each.
local function student(e, t, dtype, noise)
    local map = maps.builtin(e.feature_map, { full = e.fullspace, bias = e.bias, skip = e.skip_connection,
                                              feature_dim = e.feature_dim })
    local function leaf(x)
        x = x:to(dtype)
        return (noise and noise(x) or x:clone()):requires_grad_()
    end
    local a = { map = map, kind = e.type, window = e.type == "linear" and 0 or e.window,
                affine = e.affine_attention_factors }
    for _, side in ipairs { "q", "k" } do
        local inst = setmetatable({}, map.meta)
        inst.layer = leaf(t["w_" .. side])
        if e.bias then inst.bias = leaf(t["bias_" .. side]) end
        a["f" .. side] = inst
    end
    if t.window_factors then a.factors = leaf(t.window_factors) end
    return a
end

local function params(a)
    local out = { w_q = a.fq.layer, w_k = a.fk.layer, bias_q = a.fq.bias, bias_k = a.fk.bias,
                  window_factors = a.factors }
    return out
end

local function cross_entropy(a_pred, a_true)
    local n = a_true:size(-1)
    return (a_pred:clamp({ min = 1e-12 }):log():log_softmax(-1) * a_true):sum() * (-n / a_true:numel())
end

local function run(c, e, t, dtype, tol, noise)
    local function input(x) return noise and noise(x:to(dtype)) or x:to(dtype) end
    local q, k, v = input(t.q), input(t.k), input(t.v)
    local a = student(e, t, dtype, noise)
    local ctx = { seen = 0 }
    local fq, fk = attention.features(a, q, k, ctx)
    c.close("feature_q", fq, t.feature_q, tol.out, tol.floor)
    c.close("feature_k", fk, t.feature_k, tol.out, tol.floor)
    c.close("y_true, op", attention.softmax(q, k, v, ctx), t.y_true, tol.out, tol.floor)
    local y_true, a_true = attention.quadratic_softmax(q, k, v)
    c.close("y_true, quadratic", y_true, t.y_true, tol.out, tol.floor)
    local y, w = attention.quadratic(a, q, k, v, fq, fk)
    c.close("y_pred, quadratic", y, t.y_pred, tol.out, tol.floor)
    c.close("a_pred", w, t.a_pred, tol.out, tol.floor)
    local mse, xent = lc.mse_loss(y, y_true), cross_entropy(w, a_true)
    c.close("loss_mse", mse, t.loss_mse, tol.loss, tol.floor)
    c.close("loss_xent", xent, t.loss_xent, tol.loss, tol.floor)
    ;(mse * 1000 + xent):backward()
    for name, p in pairs(params(a)) do
        local g = p.grad or lc.zeros_like(p)
        c.close("grad_" .. name, g, t["grad_" .. name], tol.grad, tol.floor)
    end
    -- what a transfer step does: the fused op's squared error, and the weights' cross entropy in tiles
    local in_tiles = student(e, t, dtype, noise)
    local tq, tk = attention.features(in_tiles, q, k, ctx)
    local tiled = tiles.xent(in_tiles, q, k, tq, tk, ctx, { tile = 1 })
    c.close("loss_xent, in tiles", tiled, t.loss_xent, tol.loss, tol.floor)
    ;(lc.mse_loss(attention.hybrid(in_tiles, q, k, v, ctx), y_true:detach()) * 1000 + tiled):backward()
    for name, p in pairs(params(in_tiles)) do
        c.close("grad_" .. name .. ", in tiles", p.grad or lc.zeros_like(p), t["grad_" .. name], tol.grad, tol.floor)
    end
    -- the fused op; the gradients of the squared error alone are not in the case: the quadratic form gives them in f64
    local plain
    do
        local b = student(e, t, "f64")
        local pq, pk, pv = t.q:to "f64", t.k:to "f64", t.v:to "f64"
        local out = attention.quadratic(b, pq, pk, pv, attention.features(b, pq, pk, ctx))
        ;(lc.mse_loss(out, (attention.quadratic_softmax(pq, pk, pv))) * 1000):backward()
        plain = params(b)
    end
    local forms = {
        fused = function(b) return attention.hybrid(b, q, k, v, ctx) end,
        ["ready features"] = function(b) return attention.generic(b, q, k, v, ctx) end,
    }
    for form, f in pairs(forms) do
        local b = student(e, t, dtype, noise)
        local out = f(b)
        ;(lc.mse_loss(out, y_true:detach()) * 1000):backward()
        c.close("y_pred, " .. form, out, t.y_pred, tol.out, tol.floor)
        for name, p in pairs(params(b)) do
            c.close(("grad %s, %s"):format(name, form), p.grad or lc.zeros_like(p),
                    plain[name].grad or lc.zeros_like(p), tol.grad,
                    tol.floor)
        end
    end
end

return function(dir, T)
    for _, e in ipairs(files.read_json(dir .. "/index.json")) do
        for _, k in ipairs { "window", "feature_dim" } do
            if e[k] == files.null then e[k] = nil end
        end
        for _, dtype in ipairs(T.DTYPES) do
            T.dtype_case("attention/" .. e.file, dtype, function(c, kind, tol, noise)
                run(c, e, T.tensors(dir .. "/" .. e.file), kind, tol, noise)
            end)
        end
    end
end
