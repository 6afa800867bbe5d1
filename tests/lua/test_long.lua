-- test_long.lua: training in chunks with a carried state: losses are those of the whole text, gradients those of the
-- whole where nothing is cut off, and memory that of a chunk.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local long = require "lolcats.long"
local lora = require "lolcats.lora"

local CONFIG = { model_type = "llama", vocab_size = 61, hidden_size = 32, intermediate_size = 40, num_hidden_layers = 3,
                 num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 4096,
                 initializer_range = 0.25 }
local function teacher(dtype)
    lc.manual_seed(1)
    return lc.model(CONFIG, { dtype = dtype or "f64" })
end
local function ids(n, seed) return t.ids(n, 61, seed) end

local KINDS = { { kind = "terrace", window = 4 }, { kind = "sliding", window = 5, affine = true }, { kind = "linear" },
                { kind = "terrace", window = 4, map = "taylor" }, { kind = "terrace", window = 4, sinks = 2 },
                { kind = "scale", window = 4 }, { kind = "terrace", window = 16, map = "t2r", softmax_layers = { 2 } },
                { attention = "lolcats_long_llama_window_tk", window = 4, map = "cosformer" } }

local function gradients(s)
    local out = {}
    for i, p in ipairs(s:trainable()) do
        out[i] = p.tensor.grad and p.tensor.grad:clone() or lc.zeros_like(p.tensor)
        p.tensor:zero_grad()
    end
    return out
end

for _, how in ipairs(KINDS) do
    local label = ("%s %s%s"):format(how.kind or how.attention, how.map or "hedgehog", how.sinks and " with sinks" or "")
    t.test("attention transfer in chunks, " .. label, function()
        local s = lc.linearize(teacher(), how)
        local row = { ids(45), ids(45, 7) }
        local want, each = s:transfer(row)
        local grads = gradients(s)
        for _, chunk in ipairs { 45, 64, 16, 7, 1 } do
            local got, parts = s:transfer_long(row, { chunk = chunk })
            t.close({ got }, { want }, 1e-10, "chunk " .. chunk)
            t.close(parts, each, 1e-10)
            local g = gradients(s)
            if chunk >= 45 then
                for i = 1, #g do t.close(g[i], grads[i], 1e-9, "gradient " .. i) end
            end
        end
        t.close({ (s:transfer_long(row, { chunk = 9, backward = false, scale = 0.5 })) }, { want / 2 }, 1e-10)
    end)
    t.test("next-token loss in chunks, " .. label, function()
        local s = lc.linearize(teacher(), how)
        s:use_linear { keep_training = { "window_factors" } }:add_lora { rank = 2 }
        for _, p in ipairs(lora.parameters(s)) do p.tensor:detach():normal_(0, 0.3) end
        local row = { ids(45), ids(45, 7) }
        local labels = { ids(45), ids(45, 7) }
        for i = 1, 12 do labels[1][i] = -100 end
        local loss, _, _, n = s:loss(row, labels)
        local want = loss:item()
        loss:backward()
        local grads = gradients(s)
        for _, chunk in ipairs { 45, 64, 16, 7 } do
            local got, count = s:loss_long(row, labels, { chunk = chunk })
            t.close({ got, count }, { want, n }, 1e-10, "chunk " .. chunk)
            local g = gradients(s)
            if chunk >= 45 then
                for i = 1, #g do t.close(g[i], grads[i], 1e-9, "gradient " .. i) end
            end
        end
    end)
end

t.test("the gradient in chunks is that of the loss with the state held fixed", function()
    local s = lc.linearize(teacher(), { window = 4 })
    local a = s.layers[1].student
    local q, k, v = lc.randn({ 1, 4, 6, 8 }, { dtype = "f64" }), lc.randn({ 1, 2, 6, 8 }, { dtype = "f64" }),
                    lc.randn({ 1, 2, 6, 8 }, { dtype = "f64" })
    local weight = lc.randn({ 1, 4, 6, 8 }, { dtype = "f64" })
    local q0, k0, v0 = lc.randn({ 1, 4, 19, 8 }, { dtype = "f64" }), lc.randn({ 1, 2, 19, 8 }, { dtype = "f64" }),
                       lc.randn({ 1, 2, 19, 8 }, { dtype = "f64" })
    local state = {}
    lc.no_grad(long.attend, a, q0, k0, v0, { state = state, seen = 0 })
    local function copy()
        local out = {}
        for name, x in pairs(state) do out[name] = x:clone() end
        return out
    end
    for _, x in ipairs { q, k, v } do x:requires_grad_(true) end
    local attention = require "lolcats.attention"
    local function run(recurrent)
        local ctx = { state = copy(), seen = 19 }
        local y
        if recurrent then
            local fq, fk = attention.features(a, q, k, ctx)
            y = attention.recurrent(a, q, k, v, fq, fk, ctx)
        else
            y = long.attend(a, q, k, v, ctx)
        end
        ;(y * weight):sum():backward()
        local out = { y:detach() }
        for _, x in ipairs { q, k, v, a.fq.layer, a.fk.layer, a.factors } do
            out[#out + 1] = x.grad:clone()
            x:zero_grad()
        end
        return out
    end
    local one, two = run(true), run(false)
    for i = 1, #one do t.close(two[i], one[i], 1e-10, "value " .. i) end
end)

t.test("halves: weights in bf16, computed in bf16", function()
    lc.manual_seed(1)
    local fine, half = lc.model(CONFIG, { dtype = "f32" }), nil
    lc.manual_seed(1)
    half = lc.model(CONFIG, { dtype = "bf16", compute = "bf16" })
    for _, how in ipairs { { window = 4 }, { kind = "linear" }, { window = 4, sinks = 2 }, { window = 4, kind = "scale" } } do
        local a, b = lc.linearize(fine, how), lc.linearize(half, how)
        local want = a:transfer({ ids(40) }, { xent = 1, backward = false })
        t.close({ (b:transfer({ ids(40) }, { xent = 1 })) }, { want }, 0.15 * want)
        t.close({ (b:transfer_long({ ids(40) }, { xent = 1, chunk = 40 })) }, { want }, 0.15 * want)
        t.ok(b:transfer_long({ ids(40) }, { chunk = 12 }) > 0)
        b:use_linear():add_lora { rank = 2 }
        t.close({ (b:loss_long({ ids(40) }, nil, { chunk = 12 })) }, { (a:loss { ids(40) }):item() }, 0.1)
        local d, e = a:distill_loss({ ids(40) }, nil), b:distill_loss({ ids(40) }, nil)
        t.close({ e:item() }, { d:item() }, 0.1)
        e:backward()
    end
end)

t.test("activations are those of a chunk", function()
    local s = lc.linearize(teacher "f32", { window = 16 })
    local function peak(n)
        collectgarbage() collectgarbage()
        local before = lc.memory "live"
        lc.reset_peak()
        s:transfer_long({ ids(n) }, { chunk = 128, xent = 0.1 })
        return lc.memory "peak" - before
    end
    peak(256)
    local short, long_text = peak(512), peak(2048)
    -- the teacher's cache grows: keys and values of 3 layers, 2 heads of 8, doubled room and a copy while it grows
    local cache = 3 * 2 * 2 * 8 * 4 * 2048 * 2
    t.ok(long_text - short < cache, ("%d at 512, %d at 2048"):format(short, long_text))
    t.errors(function() s:transfer_long({ ids(20) }, { start = { 2 } }) end, "no left padding")
    t.errors(function() s:transfer_long({ ids(20) }, { chunk = 0 }) end, "chunk")
end)

t.finish()
