-- test_model.lua: loading, refusing, forward, state, generation and chat plumbing on small random models and on
-- made-up files.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"
local session = require "lolcats.session"
local config = require "lolcats.models.config"
local hub = require "lolcats.hub"

local BASE = { model_type = "llama", vocab_size = 97, hidden_size = 32, intermediate_size = 48, num_hidden_layers = 3,
               num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 128,
               initializer_range = 0.2, eos_token_id = 2, bos_token_id = 1 }

local function with(changes)
    local out = {}
    for k, v in pairs(BASE) do out[k] = v end
    for k, v in pairs(changes or {}) do out[k] = v end
    return out
end

local function ids(n, seed) return t.ids(n, 97, seed) end

local scratch = os.tmpname()
os.remove(scratch)
files.make_dirs(scratch)

t.test("a config that cannot be computed is refused by name", function()
    t.errors(function() config.normalize(with { model_type = "gpt2" }, "c") end, "'gpt2' is not supported")
    t.errors(function() config.normalize(with { architectures = { "MixtralForCausalLM" } }, "c") end, "MixtralForCausalLM")
    t.errors(function() config.normalize(with { architectures = { "Qwen2MoeForCausalLM" } }, "c") end, "mixture of experts")
    t.errors(function() config.normalize(with { model_type = "mixtral" }, "c") end, "mixture of experts")
    t.errors(function() config.normalize(with { num_local_experts = 8 }, "c") end, "mixture of experts")
    t.errors(function() config.normalize(with { architectures = { "LlamaForSequenceClassification" } }, "c") end,
             "LlamaForSequenceClassification")
    t.errors(function() config.normalize(with { rope_scaling = { rope_type = "axial", factor = 2 } }, "c") end, "axial")
    t.errors(function() config.normalize(with { rope_scaling = { rope_type = "linear" } }, "c") end, "'factor'")
    t.errors(function() config.normalize(with { partial_rotary_factor = 0.5 }, "c") end, "partial_rotary_factor")
    t.errors(function() config.normalize(with { model_type = "mistral", sliding_window = 2.5 }, "c") end, "sliding_window")
    t.errors(function() config.normalize(with { model_type = "../llama" }, "c") end, "not supported")
    t.errors(function() config.normalize(with { hidden_act = "gelu" }, "c") end, "gelu")
    t.errors(function() config.normalize(with { hidden_size = "x" }, "c") end, "hidden_size")
    t.errors(function() config.normalize(with { num_key_value_heads = 3 }, "c") end, "not a multiple")
    t.errors(function() config.normalize(with { quantization_config = { quant_method = "gptq" } }, "c") end, "gptq")
end)

t.test("rotary frequencies: plain, linear, llama3", function()
    local c = config.normalize(with { head_dim = 128, rope_theta = 500000, rope_scaling = {
        rope_type = "llama3", factor = 8, low_freq_factor = 1, high_freq_factor = 4, original_max_position_embeddings = 8192 } }, "c")
    local f = config.inv_freq(c)
    t.close({ f[1], f[2], f[30], f[33], f[64] }, { 1, .814617217, .0021665704, .00052484608, 3.06892588e-7 }, 5e-8)
    c = config.normalize(with { head_dim = 128, rope_theta = 10000, rope_scaling = { type = "linear", factor = 2 } }, "c")
    t.close({ config.inv_freq(c)[33] }, { 0.005 }, 1e-12)
end)

t.test("save, load, and the same logits; in shards too", function()
    local model = lc.model(with())
    local dir = scratch .. "/plain"
    model:save_weights(dir)
    local again = lc.load(dir)
    local a, b = model:logits(ids(9)), again:logits(ids(9))
    t.close(b, a, 0)
    t.eq(again.weights["model.layers.0.self_attn.q_proj.weight"]:storage_id(),
         again.weights["model.layers.0.self_attn.v_proj.weight"]:storage_id(), "q and v share a storage")
    -- two shards
    local shards = scratch .. "/shards"
    files.make_dirs(shards)
    files.write(shards .. "/config.json", files.read(dir .. "/config.json"))
    local f, one, two, map = files.open_tensors(dir), {}, {}, {}
    for i, name in ipairs(f:names()) do
        local part = i % 2 == 0 and one or two
        part[name] = f:tensor(name)
        map[name] = i % 2 == 0 and "a.safetensors" or "b.safetensors"
    end
    files.save_tensors(shards .. "/a.safetensors", one)
    files.save_tensors(shards .. "/b.safetensors", two)
    files.write_json(shards .. "/model.safetensors.index.json", { weight_map = map })
    f:close()
    t.close(lc.load(shards):logits(ids(9)), a, 0)
    -- tied: the one matrix may be stored under the head's name
    local tied = lc.model(with { tie_word_embeddings = true })
    tied:save_weights(scratch .. "/tied")
    local names = {}
    f = files.open_tensors(scratch .. "/tied")
    for _, name in ipairs(f:names()) do
        names[name == "model.embed_tokens.weight" and "lm_head.weight" or name] = f:tensor(name)
    end
    files.make_dirs(scratch .. "/tied2")
    files.save_tensors(scratch .. "/tied2/model.safetensors", names)
    files.write(scratch .. "/tied2/config.json", files.read(scratch .. "/tied/config.json"))
    f:close()
    t.close(lc.load(scratch .. "/tied2"):logits(ids(9)), tied:logits(ids(9)), 0)
end)

t.test("missing, misshapen and NaN weights are named", function()
    local function broken(label, change)
        local dir = scratch .. "/" .. label
        lc.model(with()):save_weights(dir)
        local f, all = files.open_tensors(dir), {}
        for _, name in ipairs(f:names()) do all[name] = f:tensor(name):clone() end
        f:close()
        change(all)
        files.save_tensors(dir .. "/model.safetensors", all)
        return dir
    end
    local name = "model.layers.1.mlp.up_proj.weight"
    local dir = broken("missing", function(all) all[name] = nil end)
    t.errors(function() lc.load(dir) end, "1 tensor is missing: model%.layers%.1%.mlp%.up_proj%.weight")
    dir = broken("shape", function(all) all[name] = lc.zeros(3, 3) end)
    t.errors(function() lc.load(dir) end, "up_proj.weight' is %[3, 3%]; the config makes it %[48, 32%]")
    dir = broken("nan", function(all) all[name]:narrow(1, 5, 1):fill_(0 / 0) end)
    t.errors(function() lc.load(dir) end, "up_proj.weight' holds 32 values that are NaN")
    t.ok(lc.load(dir, { check = false }), "check = false loads it")
end)

t.test("names that are no model say what was tried", function()
    t.errors(function() lc.load("no/such", { offline = true }) end, "Hugging Face cache")
    t.errors(function() lc.load "nothing-here" end, "no such folder or file")
    t.errors(function() lc.load(scratch) end, "config.json")
    t.errors(function() lc.load(scratch .. "/plain", { dtype = "q9" }) end, "q9")
end)

t.test("a Hub id is found in the local cache", function()
    local root = hub.hf_cache() -- only its spelling is checked: the environment cannot be set from here
    t.ok(root:match "hub$" or os.getenv "HF_HUB_CACHE", root)
end)

t.test("a prefix's logits do not depend on what follows, and batches equal single rows", function()
    local model = lc.model(with())
    local long = ids(24)
    local short = { unpack(long, 1, 11) }
    local a, b = model:logits(long), model:logits(short)
    t.close(a:narrow(2, 1, 11), b, 1e-6)
    local two = model:logits { long, ids(24, 7) }
    t.close(two:narrow(1, 1, 1), a, 1e-6)
    t.close(model:logits(long, { last = true }), a:select(2, -1), 1e-6)
end)

t.test("left padding equals no padding", function()
    local model = lc.model(with())
    local real = ids(10)
    local padded = { 0, 0, 0, 0 }
    for _, id in ipairs(real) do padded[#padded + 1] = id end
    local a = model:logits(real)
    local b = model:logits({ padded }, { start = { 4 } }):narrow(2, 5, 10)
    t.close(b, a, 1e-5)
end)

t.test("a state gives what the whole text gives, in any split", function()
    local model = lc.model(with())
    local all = ids(30)
    local want = model:logits(all)
    for _, sizes in ipairs { { 30 }, { 1 }, { 7, 1, 2 } } do
        local state, at, rows, i = model:new_state(), 0, {}, 1
        while at < 30 do
            local n = math.min(sizes[(i - 1) % #sizes + 1], 30 - at)
            local part = { unpack(all, at + 1, at + n) }
            rows[#rows + 1] = lc.no_grad(function() return model:lm_head(model:forward(part, { state = state })) end)
            at, i = at + n, i + 1
        end
        t.close(lc.cat(rows, 2), want, 1e-5)
        model:drop_state(state)
    end
end)

t.test("loss: labels, ignored rows, a batch", function()
    local model = lc.model(with())
    local row = ids(12)
    local loss, each, _, n = model:loss(row)
    t.eq(n, 11)
    local logits = model:logits(row):reshape(12, -1):log_softmax(-1)
    local want = 0
    for i = 1, 11 do want = want - logits[{ i, row[i + 1] + 1 }]:item() / 11 end
    t.close({ loss:item() }, { want }, 1e-5)
    t.eq(each:numel(), 11)
    local labels = {}
    for i = 1, 12 do labels[i] = i > 8 and row[i] or -100 end
    local part = model:loss(row, labels)
    t.close({ part:item() }, { each:narrow(1, 8, 4):mean():item() }, 1e-5)
    t.errors(function() model:loss(row, { -100, -100 }) end, "labels: expected %[1, 12%]")
    local none = {}
    for i = 1, 12 do none[i] = -100 end
    t.errors(function() model:loss(row, none) end, "no label to learn from")
end)

t.test("ids outside the vocabulary and empty rows are refused", function()
    local model = lc.model(with())
    t.errors(function() model:logits { 1, 2, 97 } end, "token id 97 at position 3")
    t.errors(function() model:logits { 1, -1 } end, "token id %-1")
    t.errors(function() model:logits {} end, "no token ids")
    t.errors(function() model:logits { { 1, 2 }, { 1 } } end, "row 2")
end)

t.test("all weights can be trained, and the head with them", function()
    local model = lc.model(with { tie_word_embeddings = true })
    for _, p in ipairs(model:params()) do p.tensor:requires_grad_(true) end
    local row = ids(12)
    local loss = model:loss(row)
    loss:backward()
    local p = model.weights["model.layers.1.self_attn.k_proj.weight"]
    local g = p.grad:narrow(1, 3, 1):narrow(2, 4, 1):item()
    local cell = p:detach():narrow(1, 3, 1):narrow(2, 4, 1)
    local old = cell:item()
    local function at(v)
        cell:fill_(v)
        return lc.no_grad(function() return (model:loss(row)):item() end)
    end
    local num = (at(old + 1e-2) - at(old - 1e-2)) / 2e-2
    t.close({ g }, { num }, 2e-3)
end)

-- A tokenizer of bytes, so that streaming can be tested to the byte.
local byte_tokenizer = {
    encode = function(_, s)
        local out = {}
        for i = 1, #s do out[i] = s:byte(i) end
        return out
    end,
    decode = function(_, list)
        local out = {}
        for i, id in ipairs(list) do out[i] = string.char(id) end
        return table.concat(out)
    end,
}

-- A model that says a given text, byte by byte, whatever it reads.
local function parrot(text, stops)
    local at = 0
    local model = { tokenizer = byte_tokenizer, special = { stop = stops or {} }, fed = 0 }
    function model:new_state() return {} end
    function model:drop_state() at = 0 end
    function model:forward(list)
        self.fed = self.fed + #list
        at = at + 1
        return lc.zeros(1, #list, 1)
    end
    function model:lm_head()
        local logits = lc.zeros(256)
        logits:narrow(1, (text:byte(at) or 0) + 1, 1):fill_(1)
        return logits
    end
    return model
end

t.test("streaming never cuts a character", function()
    local text = "héllo 你好 😀 ok"
    local pieces = {}
    local got = session.generate(parrot(text), "x", { max_new = #text, stream = function(p) pieces[#pieces + 1] = p end })
    t.eq(got, text)
    t.eq(table.concat(pieces), text)
    for _, p in ipairs(pieces) do
        t.ok(not p:match "^[\128-\191]" and not p:match "[\192-\255]$", ("%q"):format(p))
    end
    t.eq(#pieces, 13)
end)

t.test("stop texts end the generation and never show", function()
    local pieces = {}
    local got, ids_, info = session.generate(parrot "one two STOP three", "x", { max_new = 18, stop = { "STOP", "never" },
        stream = function(p) pieces[#pieces + 1] = p end })
    t.eq(got, "one two ")
    t.eq(table.concat(pieces), "one two ")
    t.eq(info.reason, "stop")
    t.eq(#ids_, 12)
    got = session.generate(parrot "ST ST STO", "x", { max_new = 9, stop = { "STOP" } })
    t.eq(got, "ST ST STO")
    local _, _, ended = session.generate(parrot("abc\3def", { [3] = true }), "x", {})
    t.eq(ended.reason, "end")
    t.errors(function() session.generate(parrot "a", "x", { max_tokens = 3 }) end, "no option 'max_tokens'")
end)

t.test("a prompt that continues is not read again", function()
    local model = lc.model(with())
    local s = model:session()
    local prompt = ids(20)
    local _, new = s:generate(prompt, { max_new = 5, stop_ids = {} })
    local longer = {}
    for _, id in ipairs(prompt) do longer[#longer + 1] = id end
    for _, id in ipairs(new) do longer[#longer + 1] = id end
    for _, id in ipairs(ids(4, 9)) do longer[#longer + 1] = id end
    if #new == 5 then
        local _, a, info = s:generate(longer, { max_new = 5 })
        t.eq(info.read_tokens, 4)
        local _, b = model:generate(longer, { max_new = 5 })
        t.eq(a, b)
    end
    local _, c, info = s:generate(prompt, { max_new = 5 })
    t.eq(info.read_tokens, 20, "another text is read from its start")
    t.eq(c, new)
end)

t.test("sampling with a seed repeats and leaves the global stream alone", function()
    local model = lc.model(with())
    lc.manual_seed(5)
    local before = lc.rng_state()
    local opts = { max_new = 12, temperature = 1, seed = 3 }
    local _, a = model:generate(ids(5), opts)
    local _, b = model:generate(ids(5), opts)
    t.eq(a, b)
    t.eq(lc.rng_state(), before)
    local _, c = model:generate(ids(5), { max_new = 12, temperature = 1, seed = 4 })
    t.ok(table.concat(a, " ") ~= table.concat(c, " "), "another seed gives another text")
end)

t.test("decoding leaves no memory behind", function()
    local model = lc.model(with())
    local s = model:session()
    s:generate(ids(8), { max_new = 20 })
    collectgarbage() collectgarbage()
    local before = lc.memory "live"
    s:generate(ids(9, 3), { max_new = 60 })
    collectgarbage() collectgarbage()
    t.ok(lc.memory "live" - before < 1e5, ("%.0f bytes more"):format(lc.memory "live" - before))
end)

os.execute("rm -rf '" .. scratch .. "'")
t.test("training a projection is seen by every forward, fused or not", function()
    lc.manual_seed(4)
    local model = lc.model(with(), { dtype = "f64" })
    local row = { ids(24) }
    local params = {}
    for _, p in ipairs(model:params "q_proj") do params[#params + 1] = p end
    for _, p in ipairs(params) do p.tensor:requires_grad_(true) end
    local flat = require("lolcats.nn").flatten(params)
    model:loss(row):backward()
    t.ok(flat.grad:abs():sum():item() > 0, "no gradient reached q_proj")
    local before = model:loss(row):item()
    lc.no_grad(function() flat.data:add_(flat.grad, -0.5) end)
    local recorded, plain = model:loss(row):item(), lc.no_grad(function() return model:loss(row):item() end)
    t.ok(recorded < before, "a step against the gradient did not help")
    t.close(plain, recorded, 1e-12)
end)

t.finish()
