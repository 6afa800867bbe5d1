-- test_improve.lua: what goes beyond the reference's recipe: KL on logits in chunks, windows drawn smaller, a linear
-- part that fades in, the measured choice of kept layers.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local lora = require "lolcats.lora"
local attention = require "lolcats.attention"

local CONFIG = { model_type = "llama", vocab_size = 61, hidden_size = 32, intermediate_size = 40, num_hidden_layers = 3,
                 num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 256,
                 initializer_range = 0.25 }
local function teacher(dtype)
    lc.manual_seed(1)
    return lc.model(CONFIG, { dtype = dtype or "f64" })
end
local function ids(n, seed) return t.ids(n, 61, seed) end
local function student(how)
    local s = lc.linearize(teacher(), how or { window = 4 })
    s:use_linear { keep_training = { "window_factors" } }:add_lora { rank = 2 }
    for _, p in ipairs(lora.parameters(s)) do p.tensor:detach():normal_(0, 0.3) end
    return s
end
local function gradients(s)
    local out = {}
    for i, p in ipairs(s:trainable()) do
        out[i] = p.tensor.grad:clone()
        p.tensor:zero_grad()
    end
    return out
end

t.test("cross entropy and KL on logits, in chunks, are those of whole logits", function()
    local s = student()
    local row, labels = { ids(23), ids(23, 5) }, { ids(23, 9), ids(23, 11) }
    for i = 1, 7 do labels[2][i] = -100 end
    local function whole(T)
        local x = s:logits(row)
        local y = lc.no_grad(function() return s.teacher:logits(row) end)
        local where, wanted = {}, {}
        for i = 1, 2 do
            for j = 2, 23 do
                if labels[i][j] ~= -100 then where[#where + 1], wanted[#wanted + 1] = (i - 1) * 23 + j - 2, labels[i][j] end
            end
        end
        local index = lc.tensor(where, { dtype = "i32" })
        x, y = x:reshape(-1, 61):index_select(1, index), y:reshape(-1, 61):index_select(1, index)
        local p, q = (x * (1 / T)):log_softmax(-1), (y * (1 / T)):log_softmax(-1)
        return lc.cross_entropy(x, lc.tensor(wanted, { dtype = "i32" })), ((q - p) * q:exp()):sum() * (T * T / #where)
    end
    for _, o in ipairs { { ce = 1, kl = 0.7, temperature = 1 }, { ce = 0, kl = 1, temperature = 2 }, { ce = 1, kl = 0 } } do
        local ce, kl = whole(o.temperature or 1)
        local want = ce * o.ce + kl * o.kl
        want:backward()
        local grads = gradients(s)
        o.chunk = 5
        local got, parts = s:distill_loss(row, labels, o)
        t.close({ got:item() }, { want:item() }, 1e-10)
        if o.kl ~= 0 then t.close({ parts.kl }, { kl:item() }, 1e-10) end
        ;(got * 1):backward()
        for i, g in ipairs(gradients(s)) do t.close(g, grads[i], 1e-9, "gradient " .. i) end
    end
    local plain = s:loss(row, labels)
    t.close({ (s:distill_loss(row, labels, { kl = 0 })):item() }, { plain:item() }, 1e-10)
    t.errors(function() s:distill_loss(row, labels, { ce = 0, kl = 0 }) end, "both 0")
    local same = lc.linearize(teacher(), { window = 64 })
    local _, parts = lc.no_grad(s.distill_loss, same, row, labels)
    t.close({ parts.kl }, { 0 }, 1e-10, "a student that is still its teacher")
end)

t.test("drawn windows hold while training only, and follow the seed", function()
    local s = lc.linearize(teacher(), { window = 8 })
    local row = { ids(40) }
    local eval = s:transfer(row, { backward = false })
    local function losses(p, sizes)
        lc.manual_seed(5)
        local out = {}
        for i = 1, 4 do
            s:draw_windows(p, sizes)
            out[i] = s:transfer(row)
            t.close({ (s:transfer(row, { backward = false })) }, { eval }, 0, "evaluation sees the whole window")
        end
        return out
    end
    local a, b = losses(0.5, { 0, 2 }), losses(0.5, { 0, 2 })
    t.eq(a, b)
    t.ok(a[1] ~= a[2] or a[2] ~= a[3])
    local linear = lc.linearize(teacher(), { kind = "linear" })
    t.close({ losses(1, { 0 })[1] }, { (linear:transfer(row)) }, 1e-9, "p = 1, size 0: purely linear")
    t.close({ losses(1, { 3 })[1] }, { (lc.linearize(teacher(), { window = 3 }):transfer(row)) }, 1e-9)
    t.close({ losses(0)[1] }, { eval }, 0)
    local sinks = lc.linearize(teacher(), { window = 8, sinks = 2 })
    t.ok(sinks:draw_windows(1, { 0, 4 }):transfer(row) > 0)
end)

t.test("a linear part that fades in", function()
    local row = { ids(40) }
    for _, how in ipairs { { window = 4 }, { window = 4, affine = true }, { window = 4, kind = "sliding", map = "dpfp" },
                           { window = 4, sinks = 2 } } do
        local s = lc.linearize(teacher(), how)
        local all = lc.no_grad(s.logits, s, row)
        local window = lc.no_grad(s.window_only, s, s.logits, s, row)
        t.close(lc.no_grad(s.logits, s:fade(1), row), all, 0)
        t.close(lc.no_grad(s.logits, s:fade(1e-13), row), window, 1e-6, "almost nothing of it")
        s:fade(0.25)
        local a = s.layers[1].student
        local q, k, v = lc.randn({ 1, 4, 19, 8 }, { dtype = "f64" }), lc.randn({ 1, 2, 19, 8 }, { dtype = "f64" }),
                        lc.randn({ 1, 2, 19, 8 }, { dtype = "f64" })
        local got = attention.hybrid(a, q, k, v, {})
        local fq, fk = attention.features(a, q, k, {})
        a.fade = nil
        t.close(got, attention.quadratic(a, q, k, v, fq * 0.25, fk), 1e-10, "a quarter of it")
        s:fade(0.5)
        local half, state = lc.no_grad(s.logits, s, row), s:new_state()
        local parts = {}
        for i, n in ipairs { 7, 1, 32 } do
            local at = ({ 0, 7, 8 })[i]
            parts[i] = s:lm_head(s:forward({ unpack(row[1], at + 1, at + n) }, { state = state }))
        end
        t.close(lc.cat(parts, 2), half, 1e-9, "decoded")
        t.ok(s:transfer(row) > 0)
    end
    t.errors(function() lc.linearize(teacher(), {}):fade(0) end, "above 0")
end)

t.test("layers are ranked by what they cost", function()
    local s = lc.linearize(teacher(), { window = 4 })
    local rows = { { ids = { ids(40) } }, { ids = { ids(40, 3) } } }
    local list, base = lc.no_grad(s.rank_layers, s, rows)
    t.eq(#list, 3)
    local function loss(m)
        local sum, n = 0, 0
        for _, r in ipairs(rows) do
            local a, b = m:nll(r.ids)
            sum, n = sum + a, n + b
        end
        return sum / n
    end
    t.close({ base }, { loss(s.teacher) }, 1e-12)
    local kept = {}
    for i = 1, 3 do
        if i ~= list[1].layer then kept[#kept + 1] = i end
    end
    t.close({ list[1].loss }, { loss(lc.linearize(teacher(), { window = 4, softmax_layers = kept })) }, 1e-10)
    t.ok(list[1].cost >= list[2].cost and list[2].cost >= list[3].cost)
    local again = lc.linearize(teacher(), { window = 4, softmax_layers = { -1 } })
    again:keep_softmax { 1 }
    t.eq(again.settings.softmax_layers, { 1, 3 })
    t.close({ loss(again) }, { loss(lc.linearize(teacher(), { window = 4, softmax_layers = { 1, 3 } })) }, 1e-12)
    local other, all = lc.no_grad(s.rank_layers, s, rows, { mode = "kept" })
    t.close({ all }, { loss(s) }, 1e-12)
    t.close({ other[1].loss }, { loss(lc.linearize(teacher(), { window = 4, softmax_layers = { other[1].layer } })) }, 1e-10)
end)

t.finish()
