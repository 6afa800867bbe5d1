-- test_compat.lua: compat = "reference" on a whole model: what differs from the default and where, decoding, saving, and
-- the rounded rotary frequencies.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"

local BASE = { model_type = "llama", vocab_size = 41, hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2,
               num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 64, initializer_range = 0.4 }

local scratch = os.tmpname()
os.remove(scratch)
files.make_dirs(scratch)
lc.manual_seed(9)
lc.model(BASE, { dtype = "f64" }):save_weights(scratch .. "/base")

local function pair(compat)
    local out = {}
    for i = 1, 2 do
        local m = lc.load(scratch .. "/base", { dtype = "f64" })
        out[i] = lc.linearize(m, { map = "hedgehog", window = 4, compat = i == 2 and compat or nil })
    end
    return out[1], out[2]
end

local function ids(n)
    local out = {}
    for i = 1, n do out[i] = (i * i * 3 + i) % 41 end
    return out
end

local function logits(m, n) return lc.no_grad(function() return m:logits(ids(n)) end) end

local function stepped(m, n, first)
    local all, state, rows, at = ids(n), m:new_state(1), {}, 1
    while at <= n do
        local part, len = {}, at == 1 and first or 1
        for i = at, at + len - 1 do part[#part + 1] = all[i] end
        rows[#rows + 1] = lc.no_grad(function() return m:lm_head(m:forward(part, { state = state })) end)
        at = at + len
    end
    m:drop_state(state)
    return lc.cat(rows, 2)
end

local function apart(a, b) return (a - b):abs():amax():item() end

t.test("the terrace: as the default for multiples of the window and up to two of them, else another", function()
    local plain, odd = pair "terrace"
    for _, n in ipairs { 5, 7, 8, 12, 16 } do t.close(logits(odd, n), logits(plain, n), 1e-10) end
    for _, n in ipairs { 3, 9, 13 } do t.ok(apart(logits(odd, n), logits(plain, n)) > 1e-6, "length " .. n) end
end)

t.test("decoding is the sliding window's", function()
    local _, odd = pair "reference"
    local sliding = lc.linearize(lc.load(scratch .. "/base", { dtype = "f64" }), { map = "hedgehog", window = 4, kind = "sliding" })
    t.close(stepped(odd, 14, 1), logits(sliding, 14), 1e-10)
    -- a text read at once, then steps: the first part is the terrace's
    t.close(stepped(odd, 14, 9):narrow(2, 1, 9), logits(odd, 9), 1e-10)
end)

t.test("transfer learns under it, and it is saved", function()
    local _, odd = pair "reference"
    t.ok(odd:transfer(ids(13)) > 0)
    for _, p in ipairs(odd:map_params()) do t.ok(p.tensor.grad, p.name) end
    odd:save(scratch .. "/student")
    local again = require("lolcats.linearize").load(scratch .. "/student", { base = lc.load(scratch .. "/base", { dtype = "f64" }) })
    t.close(logits(again, 13), logits(odd, 13), 1e-12)
    t.errors(function() odd:transfer({ ids(13) }, { start = { 2 } }) end, "left padding")
end)

t.test("rotary frequencies are rounded as soon as LoRA is attached", function()
    local plain, odd = pair "rope"
    t.close(logits(odd, 9), logits(plain, 9), 0)
    plain:add_lora {}
    odd:add_lora {}
    t.ok(apart(logits(odd, 9), logits(plain, 9)) > 1e-6)
    t.ok(apart(odd.inv_freq, plain.inv_freq) > 0 and apart(odd.inv_freq, plain.inv_freq) < 2e-3)
    t.errors(function() pair "everything" end, "compat")
end)

t.finish()
