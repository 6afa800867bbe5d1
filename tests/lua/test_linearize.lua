-- test_linearize.lua: students on small random models: transfer, layer-local backward, LoRA, custom maps,
-- checkpoints, decoding.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"
local maps = require "lolcats.feature_map"
local lora = require "lolcats.lora"
local nn = require "lolcats.nn"

local CONFIG = { model_type = "llama", vocab_size = 61, hidden_size = 32, intermediate_size = 40, num_hidden_layers = 3,
                 num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 256,
                 initializer_range = 0.25 }

local function teacher(dtype)
    lc.manual_seed(1)
    return lc.model(CONFIG, { dtype = dtype })
end

local function ids(n, seed) return t.ids(n, 61, seed) end

local scratch = os.tmpname()
os.remove(scratch)
files.make_dirs(scratch)

local CUSTOM = [[
local lc = require "lolcats"
return lc.feature_map {
    doc = "squared ReLU on both half-spaces",
    init = function(self, heads, dim) self.w = lc.param(lc.eye(dim):expand(heads, dim, dim):clone()) end,
    forward = function(self, x, ctx)
        local h = lc.einsum("b h t d, h d f -> b h t f", x, self.w)
        return lc.cat({ h:relu():square(), (-h):relu():square() }, -1) + 1e-6
    end,
}
]]
files.write(scratch .. "/squares.lua", CUSTOM)

t.test("names, shapes and start values are the reference's", function()
    local s = lc.linearize(teacher(), { map = "hedgehog", window = 8 })
    local names = {}
    for i, p in ipairs(s:map_params()) do names[i] = p.name .. " " .. table.concat(p.tensor.shape, ",") end
    t.eq(#names, 9)
    t.eq(names[1], "model.layers.0.self_attn.window_factors 1,4,1,1")
    t.eq(names[2], "model.layers.0.self_attn.feature_map_q.mlp.layer 4,8,4")
    t.eq(names[3], "model.layers.0.self_attn.feature_map_k.mlp.layer 4,8,4")
    t.close(s:map_params()[1].tensor, { -2.1972245, -2.1972245, -2.1972245, -2.1972245 }, 1e-6)
    local two = lc.linearize(teacher(), { map = "t2r", kind = "linear" })
    local list = {}
    for i, p in ipairs(two:map_params()) do list[i] = p.name:match "self_attn%.(.+)$" end
    t.eq({ unpack(list, 1, 4) }, { "feature_map_q.mlp.layer", "feature_map_q.mlp.bias", "feature_map_k.mlp.layer", "feature_map_k.mlp.bias" })
    local q, k = two.layers[1].student.fq, two.layers[1].student.fk
    t.close(q.bias, k.bias:totable(), 0, "k starts as a copy of q")
end)

t.test("options that do not exist or fit are refused", function()
    local m = teacher()
    t.errors(function() lc.linearize(m, { windows = 3 }) end, "no option 'windows'")
    t.errors(function() lc.linearize(m, { map = "hedgehug" }) end, "no feature map 'hedgehug'")
    t.errors(function() lc.linearize(m, { kind = "stairs" }) end, "'stairs'")
    t.errors(function() lc.linearize(m, { window = 1.5 }) end, "window")
    t.errors(function() lc.linearize(m, { softmax_layers = { 4 } }) end, "no layer 4")
    t.errors(function() lc.linearize(m, { map = "softmax_dim", skip = true, feature_dim = 3 }) end, "skip connection")
    t.errors(function() lc.linearize(lc.linearize(m, {}), {}) end, "linearized already")
end)

t.test("gradient of a transfer step equals that of the joint loss", function()
    local s = lc.linearize(teacher "f64", { map = "hedgehog", window = 4 })
    local row = ids(22)
    local loss = s:transfer({ row })
    local got = {}
    for _, p in ipairs(s:map_params()) do
        got[p.name] = p.tensor.grad:clone()
        p.tensor:zero_grad()
    end
    -- the joint loss, by the plain form and one backward at the end
    local attention = require "lolcats.attention"
    local x, ctx, joint = nil, nil, nil
    local model = s.teacher
    local tensor = nn.ids { row }
    ctx = model:context(tensor)
    x = lc.embedding(model.embed, tensor)
    for i, layer in ipairs(model.layers) do
        local n = model:norm_in(layer, x)
        local q, k, v = model:qkv(layer, n, ctx)
        local y = attention.softmax(q, k, v, { seen = 0 })
        local a = s.layers[i].student
        local fq, fk = attention.features(a, q, k, {})
        local part = lc.mse_loss(attention.quadratic(a, q, k, v, fq, fk), y) * (1000 / #model.layers)
        joint = joint and joint + part or part
        x = model:finish(layer, x, y, ctx)
    end
    joint:backward()
    t.close({ loss }, { joint:item() }, 1e-9)
    for _, p in ipairs(s:map_params()) do t.close(p.tensor.grad, got[p.name]:totable(), 1e-9, p.name) end
end)

t.test("accumulated micro-batches equal one batch", function()
    local s = lc.linearize(teacher "f64", { window = 4 })
    local rows = { ids(16), ids(16, 5) }
    local whole = s:transfer(rows)
    local want = {}
    for i, p in ipairs(s:map_params()) do want[i] = p.tensor.grad:clone(); p.tensor:zero_grad() end
    local parts = s:transfer({ rows[1] }, { scale = 0.5 }) + s:transfer({ rows[2] }, { scale = 0.5 })
    t.close({ parts }, { whole }, 1e-10)
    for i, p in ipairs(s:map_params()) do t.close(p.tensor.grad, want[i]:totable(), 1e-10) end
    t.errors(function() s:transfer(rows, { mse = 0 }) end, "both 0")
end)

t.test("fused, ready features and quadratic give one loss", function()
    for _, map in ipairs(maps.names()) do
        for _, kind in ipairs { "terrace", "sliding", "linear" } do
            local s = lc.linearize(teacher "f64", { map = map, kind = kind, window = kind ~= "linear" and 5 or nil })
            local row = { ids(23) }
            local a = s:transfer(row, { backward = false })
            local b = s:transfer(row, { backward = false, plain = true })
            local c = s:transfer(row, { backward = false, xent = 1e-300 })
            t.close({ a, a }, { b, c }, 1e-9, map .. " " .. kind)
        end
    end
end)

t.test("transfer learns, and holds no more memory at the end", function()
    local s = lc.linearize(teacher(), { window = 4 })
    local flat = nn.flatten(s:trainable())
    local row = { ids(48) }
    local first = s:transfer(row)
    flat:zero_grad()
    local last, live
    for step = 1, 30 do
        last = s:transfer(row)
        lc.adamw_(flat.data, flat.grad, flat.m, flat.v, 1e-2, step)
        flat:zero_grad()
        if step == 3 then live = lc.memory "live" end
    end
    t.ok(last < 0.8 * first, ("%g -> %g"):format(first, last))
    collectgarbage() collectgarbage()
    t.ok(lc.memory "live" <= live, "live memory grew")
end)

t.test("kept softmax layers are the teacher's, and are left out of the loss and of LoRA", function()
    local m = teacher()
    local s = lc.linearize(m, { window = 4, softmax_layers = { 1, -1 } })
    t.eq(#s:map_params(), 3)
    local _, each = s:transfer({ ids(20) })
    t.ok(each[1] == 0 and each[3] == 0 and each[2] > 0)
    s:use_linear():add_lora { rank = 2 }
    t.eq(#lora.parameters(s), 8)
    local all = lc.linearize(teacher(), { window = 4, softmax_layers = { 1, 2, 3 } })
    t.close(all:logits(ids(20)), m:logits(ids(20)), 0)
    t.errors(function() all:transfer({ ids(20) }) end, "nothing to teach")
end)

t.test("with the window longer than the text the student is its teacher", function()
    local m = teacher()
    local s = lc.linearize(m, { window = 64 })
    t.close(s:logits(ids(40)), m:logits(ids(40)), 1e-5)
    t.close(s:window_only(s.logits, s, ids(40)), m:logits(ids(40)), 1e-5)
    t.close(lc.linearize(m, { window = 4 }):logits(ids(40), { teacher = true }), m:logits(ids(40)), 0)
end)

t.test("LoRA: PEFT's arithmetic, names, merging", function()
    local m = teacher "f64"
    local s = lc.linearize(m, { window = 4 })
    local row = ids(20)
    local plain = s:logits(row)
    s:use_linear():add_lora { rank = 3, alpha = 6, targets = { "q_proj", "o_proj", "up_proj" } }
    local list = lora.parameters(s)
    t.eq(#list, 18)
    t.eq(list[1].name, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    t.close(s:logits(row), plain, 1e-12, "B = 0 changes nothing")
    for _, p in ipairs(list) do
        if p.name:match "lora_A" then
            t.ok(p.tensor:detach():abs():amax():item() <= 1 / math.sqrt(p.tensor:size(2)), "A within its bound")
        else
            p.tensor:detach():normal_(0, 0.2)
        end
    end
    local with = lc.no_grad(function() return s:logits(row) end)
    t.ok((with - plain):abs():amax():item() > 1e-3)
    local before = m:logits(row)
    s:merge_lora()
    t.close(lc.no_grad(function() return s:logits(row) end), with, 1e-10, "merged")
    t.close(m:logits(row), before, 0, "the teacher is not touched")
    s:unmerge_lora()
    t.close(lc.no_grad(function() return s:logits(row) end), with, 1e-10, "unmerged")
    t.errors(function() s:add_lora { targets = { "q_proj" } } end, "has an adapter already")
    t.errors(function() lc.linearize(m, {}):add_lora { targets = { "qkv" } } end, "'qkv' names no projection")
end)

t.test("the gradient of LoRA and of kept maps is that of the loss", function()
    local s = lc.linearize(teacher "f64", { window = 4 })
    s:use_linear { keep_training = { "window_factors" } }:add_lora { rank = 2 }
    for _, p in ipairs(lora.parameters(s)) do p.tensor:detach():normal_(0, 0.3) end
    local row = ids(18)
    s:loss(row):backward()
    for _, p in ipairs(s:trainable()) do
        local cell = p.tensor:detach():reshape(-1):narrow(1, 1, 1)
        local old = cell:item()
        local function at(v)
            cell:fill_(v)
            return lc.no_grad(function() return (s:loss(row)):item() end)
        end
        local num = (at(old + 1e-6) - at(old - 1e-6)) / 2e-6
        cell:fill_(old)
        t.close({ p.tensor.grad:reshape(-1):narrow(1, 1, 1):item() }, { num }, 1e-6, p.name)
    end
    t.eq(#s:trainable(), 3 + 24)
end)

t.test("one flat buffer holds parameters, gradients and moments", function()
    local s = lc.linearize(teacher(), { window = 4 })
    local flat = nn.flatten(s:trainable())
    local id = flat.data:storage_id()
    for _, p in ipairs(s:trainable()) do t.eq(p.tensor:storage_id(), id, p.name) end
    s:transfer({ ids(20) })
    local sum = 0
    for _, p in ipairs(s:trainable()) do
        t.eq(p.tensor.grad:storage_id(), flat.grad:storage_id())
        sum = sum + p.tensor.grad:square():sum():item()
    end
    t.close({ flat:grad_norm() }, { math.sqrt(sum) }, 1e-5)
    flat:zero_grad()
    t.eq(s:trainable()[1].tensor.grad:abs():sum():item(), 0)
end)

t.test("every map decodes what it computes at once", function()
    local list = maps.names()
    list[#list + 1] = scratch .. "/squares.lua"
    for _, map in ipairs(list) do
        for _, how in ipairs { { kind = "terrace", window = 4 }, { kind = "sliding", window = 5 }, { kind = "linear" },
                               { kind = "terrace", window = 4, affine = true } } do
            how.map = map
            local s = lc.linearize(teacher "f64", how)
            local all = ids(29)
            local want = s:logits(all)
            local state, at, rows, sizes = s:new_state(), 0, {}, { 6, 1, 1, 9, 2 }
            local i = 1
            while at < 29 do
                local n = math.min(sizes[(i - 1) % #sizes + 1], 29 - at)
                rows[#rows + 1] = s:lm_head(s:forward({ unpack(all, at + 1, at + n) }, { state = state }))
                at, i = at + n, i + 1
            end
            t.close(lc.cat(rows, 2), want, 1e-9, map .. " " .. how.kind)
            s:drop_state(state)
        end
    end
end)

t.test("several sequences in one row are as if each stood alone", function()
    local lengths, offsets, all = { 9, 1, 14, 5 }, { 0 }, {}
    for i, n in ipairs(lengths) do
        offsets[i + 1] = offsets[i] + n
        for _, id in ipairs(ids(n)) do all[#all + 1] = id end
    end
    for _, how in ipairs { { kind = "terrace", window = 4 }, { kind = "sliding", window = 3 }, { kind = "linear" },
                           { map = scratch .. "/squares.lua", window = 4 }, { window = 4, softmax_layers = { 1 } } } do
        local s = lc.linearize(teacher "f64", how)
        for _, p in ipairs(s:map_params()) do p.tensor:requires_grad_(true) end
        local function grads()
            local out = {}
            for i, p in ipairs(s:map_params()) do
                out[i] = p.tensor.grad and p.tensor.grad:clone() or lc.zeros_like(p.tensor:detach())
                p.tensor.grad = nil
            end
            return out
        end
        local packed = s:logits(all, { cu_seqlens = offsets })
        local loss, _, _, n = s:loss(all, nil, { cu_seqlens = lc.tensor(offsets, { dtype = "i32" }) })
        t.eq(n, #all - #lengths)
        loss:backward()
        local got, sum = grads(), 0
        for i, length in ipairs(lengths) do
            local part = { unpack(all, offsets[i] + 1, offsets[i + 1]) }
            t.close(packed:narrow(2, offsets[i] + 1, length), s:logits(part), 1e-10, "sequence " .. i)
            if length > 1 then
                local one = s:loss(part)
                sum = sum + one:item() * (length - 1);
                (one * ((length - 1) / n)):backward()
            end
        end
        t.close({ loss:item() }, { sum / n }, 1e-10)
        for i, g in ipairs(grads()) do t.close(got[i], g, 1e-9, "gradient " .. i) end
        t.close({ s:transfer(all, { cu_seqlens = offsets }) > 0 and 1 or 0 }, { 1 }, 0)
        t.errors(function() s:logits(all, { cu_seqlens = { 0, 5 } }) end, "cu_seqlens")
        t.errors(function() s:logits(all, { cu_seqlens = { 0, 9, 5, 29 } }) end, "cu_seqlens")
    end
end)

t.test("many rows are read in slices, and decode as they would have done at once", function()
    local s = lc.linearize(teacher "f64", { window = 4 })
    local rows = {}
    for i = 1, 5 do rows[i] = ids(11) end
    local function run(tokens, opts)
        local state, out = s:new_state(5, { teacher = opts.teacher }), {}
        for _, part in ipairs { { 1, 7 }, { 8, 10 }, { 11, 11 } } do
            local cut = {}
            for i, row in ipairs(rows) do cut[i] = { unpack(row, part[1], part[2]) } end
            out[#out + 1] = s:forward(cut, { state = state, tokens_at_once = tokens, teacher = opts.teacher,
                                             start = part[1] == 1 and opts.start or nil })
        end
        t.eq(state.seen, 11)
        s:drop_state(state)
        return lc.cat(out, 2)
    end
    for _, opts in ipairs { {}, { teacher = true } } do
        t.close(run(14, opts), run(1e6, opts), 1e-12)
        t.close(run(1, opts), run(1e6, opts), 1e-12)
    end
    local start = { start = { 0, 2, 1, 0, 3 } }
    local function first(tokens)
        local state = s:new_state(5)
        local x = s:forward(rows, { state = state, tokens_at_once = tokens, start = start.start })
        s:drop_state(state)
        return x
    end
    t.close(first(22), first(1e6), 1e-12)
end)

t.test("left padding: blocks count from the first real token", function()
    local s = lc.linearize(teacher "f64", { window = 4 })
    local real = ids(21)
    local padded = { 0, 0, 0 }
    for _, id in ipairs(real) do padded[#padded + 1] = id end
    t.close(s:logits({ padded }, { start = { 3 } }):narrow(2, 4, 21), s:logits(real), 1e-9)
end)

t.test("lc.check passes good maps and tells what is wrong with bad ones", function()
    local good = lc.check(scratch .. "/squares.lua", { windows = { 0, 4 } })
    t.ok(good.ok, tostring(good))
    local negative = lc.feature_map { forward = function(_, x) return x end }
    local v = lc.check(negative, { windows = { 4 } })
    t.ok(not v.ok and v.positive == false, tostring(v))
    local mixing = lc.feature_map { forward = function(_, x) return (x:cumsum(3) * 0.1):exp() end }
    v = lc.check(mixing, { windows = { 4 } })
    t.ok(not v.ok and v["row-wise"] == false, tostring(v))
    local bent = lc.custom { forward = function(_, x) return x:square() + 0.1 end, backward = function(_, g) return g end }
    v = lc.check(lc.feature_map { forward = function(_, x) return bent(x) end }, { windows = { 4 } })
    t.ok(not v.ok and v.gradient == false, tostring(v))
    v = lc.check(lc.feature_map { forward = function(_, x) return x:sum(-1) end })
    t.ok(not v.ok and tostring(v):find "expected %[2, 2, 11, features%]", tostring(v))
    t.errors(function() lc.feature_map { init = function() end } end, "function `forward`")
end)

t.test("save and load: built-in map, LoRA", function()
    local m = teacher()
    m:save_weights(scratch .. "/base")
    local base = lc.load(scratch .. "/base")
    local s = lc.linearize(base, { map = "hedgehog", window = 4, kind = "sliding" })
    s:transfer({ ids(20) })
    s:use_linear():add_lora { rank = 2, alpha = 4 }
    for _, p in ipairs(s:trained()) do p.tensor:detach():add_(lc.randn(p.tensor.shape), 0.1) end
    s:save(scratch .. "/student")
    local again = lc.load(scratch .. "/student")
    t.ok(again.is_student)
    t.close(lc.no_grad(function() return again:logits(ids(25)) end), lc.no_grad(function() return s:logits(ids(25)) end), 0)
    local other = lc.load(scratch .. "/student", { base = base })
    t.close(lc.no_grad(function() return other:logits(ids(25)) end), lc.no_grad(function() return s:logits(ids(25)) end), 0)
end)

t.test("save and load: code runs only when trusted", function()
    local base = lc.load(scratch .. "/base")
    local s = lc.linearize(base, { map = scratch .. "/squares.lua", window = 4 })
    for _, p in ipairs(s:trained()) do p.tensor:detach():add_(lc.randn(p.tensor.shape), 0.1) end
    local dir = scratch .. "/custom"
    s:save(dir)
    t.eq(files.read(dir .. "/feature_map.lua"), CUSTOM)
    t.errors(function() lc.load(dir) end, "holds code.*feature_map%.lua.*%-%-trust%-code")
    local want = lc.no_grad(function() return s:logits(ids(25)) end)
    t.close(lc.no_grad(function() return lc.load(dir, { trust_code = true }):logits(ids(25)) end), want, 0)
    t.close(lc.no_grad(function() return lc.load(dir, { map = scratch .. "/squares.lua" }):logits(ids(25)) end), want, 0)
    rawset(lc, "trust_code", true)
    t.ok(lc.load(dir))
    rawset(lc, "trust_code", nil)
end)

t.test("the source of a map inside a script is cut out of it", function()
    local inline = lc.feature_map {
        doc = "with a } in a string, and -- marks",
        init = function(self, heads, dim) self.w = lc.param(lc.ones(heads, dim, 3)) end, -- } in a comment
        forward = function(self, x) return x:matmul(self.w):square() + 1e-3 end,
    }
    local text = assert(maps.source_of(inline))
    local again = maps.from_source(text, "cut.lua")
    t.eq(again.doc, inline.doc)
    local outside = 2
    local bound = lc.feature_map { forward = function(_, x) return x:square() * outside end }
    local none, why = maps.source_of(bound)
    t.ok(none == nil and why:find "'outside'", why)
    local s = lc.linearize(lc.load(scratch .. "/base"), { map = bound, window = 4 })
    s:save(scratch .. "/unsaved")
    t.errors(function() lc.load(scratch .. "/unsaved", { trust_code = true }) end, "give it as map =")
    t.ok(lc.load(scratch .. "/unsaved", { map = bound }))
end)

t.test("options of a custom map are stored with it", function()
    files.write(scratch .. "/power.lua", [[
        local lc = require "lolcats"
        return lc.feature_map { forward = function(self, x) return (x:abs() + 0.1) ^ (self.options.power or 1) end }
    ]])
    local s = lc.linearize(lc.load(scratch .. "/base"), { map = scratch .. "/power.lua", window = 4, map_options = { power = 3 } })
    local one = lc.linearize(lc.load(scratch .. "/base"), { map = scratch .. "/power.lua", window = 4 })
    t.ok((s:logits(ids(20)) - one:logits(ids(20))):abs():amax():item() > 1e-4)
    s:save(scratch .. "/powered")
    t.close(lc.load(scratch .. "/powered", { trust_code = true }):logits(ids(20)), s:logits(ids(20)), 0)
    s.source = "gone/away"
    s:save(scratch .. "/homeless")
    t.errors(function() lc.load(scratch .. "/homeless", { trust_code = true }) end, "made from 'gone/away'.*give the base model")
end)

t.test("gradient checkpointing: the same losses and gradients, dropout and drawn windows too, with less memory", function()
    for _, how in ipairs { {}, { dropout = 0.3 }, { drawn = true }, { maps = true } } do
        local seen = {}
        for k = 1, 2 do
            lc.manual_seed(4)
            local m = lc.model({ model_type = "llama", vocab_size = 50, hidden_size = 32, intermediate_size = 96, num_hidden_layers = 8,
                                 num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 512,
                                 initializer_range = 0.15 }, { dtype = "f64" })
            local s = lc.linearize(m, { window = 4 }):use_linear { keep_training = how.maps and { "." } or nil }
            s:add_lora { rank = 2, dropout = how.dropout }
            for _, p in ipairs(s:trainable()) do
                p.tensor:detach():add_(lc.randn(p.tensor.shape, { dtype = "f64" }), 0.1)
            end
            s:recompute_layers(k == 2)
            if how.drawn then s:draw_windows(0.5) end
            collectgarbage() collectgarbage()
            lc.reset_peak()
            local before = lc.memory "live"
            local row = ids(200)
            for i, id in ipairs(row) do row[i] = id % 50 end
            seen[k] = { lc.scope(function()
                local loss = s:loss(row)
                loss:backward()
                return loss:item()
            end), lc.memory "peak" - before, s:trainable() }
        end
        t.close({ seen[2][1] }, { seen[1][1] }, 1e-12)
        for i, p in ipairs(seen[1][3]) do t.close(seen[2][3][i].tensor.grad, p.tensor.grad, 1e-10, p.name) end
        if not how.maps then
            t.ok(seen[2][2] < 0.6 * seen[1][2], ("%d bytes, without %d"):format(seen[2][2], seen[1][2]))
        end
    end
end)

t.test("damaged checkpoints are named", function()
    files.make_dirs(scratch .. "/bad")
    files.write(scratch .. "/bad/student.json", "{")
    t.errors(function() lc.load(scratch .. "/bad") end, "student.json")
    files.write(scratch .. "/bad/student.json", '{"format": "other"}')
    t.errors(function() lc.load(scratch .. "/bad") end, "not a saved student")
    files.write(scratch .. "/bad/student.json", files.read(scratch .. "/student/student.json"))
    files.save_tensors(scratch .. "/bad/student.safetensors", { x = lc.zeros(1) })
    t.errors(function() lc.load(scratch .. "/bad") end, "has no tensor 'model.layers.0.self_attn.window_factors'")
end)

os.execute("rm -rf '" .. scratch .. "'")
t.finish()
