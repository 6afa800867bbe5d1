-- The data sets of the reference's configurations: Alpaca packed and not, SAMSum's form, a chat template, samples of
-- RedPajama with their limits, and rankings by effective sequence length with their files.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local lc = require "lolcats"
local files, data = lc.files, require "lolcats.data"
local reference, esl, tiny = require "lolcats.data.reference", require "lolcats.data.effective_length",
    require "lolcats.tiny"
local attention = require "lolcats.attention"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)
lc.manual_seed(1)
tiny.write_model(root .. "/model", "llama3", { initializer_range = 0.4 })
tiny.write_records(root .. "/records.json", 260)
local model = lc.load(root .. "/model", { dtype = "f32" })
local tok = model.tokenizer
local records = files.read_json(root .. "/records.json")

local function ids_of(row) return row.ids:totable()[1] end
local function load(block, more)
    local opts = { model = model, source = root .. "/records.json" }
    for k, v in pairs(more or {}) do opts[k] = v end
    return reference.load(block, opts)
end

t.test("Alpaca: the first records are held out, the rest packed; prompts for the answers", function()
    local d = load { name = "alpaca_clean", dataset_config = { path = "x/y", chunk_size = 700 } }
    t.eq(#d.test, 130) -- 200, but at most half
    t.eq(d.test[3].prompt, data.alpaca_prompt(records[3]))
    t.eq(d.test[3].answer, records[3].output)
    local first = tok:encode(data.alpaca_prompt(records[131]), { special = true, parse = true })
    t.eq({ unpack(ids_of(d.train:row(1)), 1, 50) }, { unpack(first, 1, 50) })
    t.eq({ unpack(ids_of(d.validation:row(1)), 1, 20) },
         { unpack(tok:encode(data.alpaca_prompt(records[1]), { special = true, parse = true }), 1, 20) })
    t.eq(load({ name = "alpaca_clean", dataset_config = { path = "x", chunk_size = 700 } }, { hold_out = 20 }).test[21],
         nil)
end)

t.test("Alpaca, not packed: a record a row, batches filled up on the right", function()
    local d = load { name = "alpaca_clean", dataset_config = { path = "x/y", concat_data = false } }
    t.eq(d.train.rows, 130)
    local one = d.train:row(2)
    local prompt = tok:encode(data.alpaca_prompt(records[132]), { special = true, parse = true })
    local answer = tok:encode(records[132].output .. "</s>", { special = false, parse = true })
    local want = { unpack(prompt) }
    for _, id in ipairs(answer) do want[#want + 1] = id end
    t.eq(ids_of(one), want)
    local labels = one.labels:totable()[1]
    t.eq(labels[#prompt], -100)
    t.eq(labels[#prompt + 1], answer[1])
    local two = d.train:batch { 1, 2 }
    t.eq(two.ids:size(1), 2)
    local sum, n = model:nll(two.ids, two.labels)
    local a, i = model:nll(d.train:row(1).ids, d.train:row(1).labels)
    local b, j = model:nll(one.ids, one.labels)
    t.eq(n, i + j)
    t.close({ sum }, { a + b }, 1e-4)
end)

t.test("dialogues become instructions", function()
    local d = reference.load({ name = "alpaca_clean", dataset_config = { name = "samsum", chunk_size = 64 } },
                             { model = model, source = {
        { dialogue = "A: Hi.\nB: Hello.", summary = "They greet." }, { dialogue = "A: Bye.", summary = "They part." },
        { dialogue = "A: So?", summary = "Nothing." } } })
    t.eq(d.test[1].prompt, data.alpaca_prompt { instruction = "Summarize this dialogue.", input = "A: Hi.\nB: Hello." })
end)

t.test("through a chat template: the first and last hundred held out, the end token learned", function()
    local seen = {}
    local d = load({ name = "alpaca_clean_instruct", dataset_config = { path = "x", chunk_size = 100 } },
                   { render = function(messages)
        seen[#seen + 1] = messages
        local out = {}
        for i, m in ipairs(messages) do out[i] = "[" .. m.role .. "]" .. m.content end
        return table.concat(out) .. "[assistant]"
    end })
    t.eq(seen[1][1].role, "system")
    t.eq(seen[1][2].content, records[66].instruction .. (records[66].input ~= "" and "\n\n" .. records[66].input or ""))
    t.eq(#d.test, 130)
    t.eq(d.test[66].answer, records[196].output)
end)

-- ---- RedPajama ----------------------------------------------------------------------------------------------------
local lines = {}
for i = 1, 30 do
    lines[i] = files.to_json { text = ("word%d "):format(i):rep(i * 3), meta = i % 2 == 0 and "{'source': 'c4'}" or
                               "{'source': 'book'}" }
end
files.make_dirs(root .. "/redpajama")
files.write(root .. "/redpajama/train.json", table.concat(lines, "\n") .. "\n")
local function rp(name, more)
    local c = { train_data = { "redpajama/train.json[50]" }, eval_data = { "redpajama/train.json" }, max_eval_num = 20,
                max_length = 300,
                min_length = 100, chunk_size = 64, seed = 42, cache_dir = "nowhere" }
    for k, v in pairs(more or {}) do c[k] = v end
    return reference.load({ name = name, dataset_config = c }, { model = model, data_dir = root })
end
local function length(i) return #tok:encode(("word%d "):format(i):rep(i * 3), { special = true, parse = true }) end
local function kept(low, high, first, last, step)
    local out = {}
    for i = first, last, step or 1 do
        local n = length(i)
        if n >= low then out[#out + 1] = n < high and n + 1 or high end
    end
    return out
end
local function total(list)
    local n = 0
    for _, v in ipairs(list) do n = n + v end
    return n
end

t.test("documents within the limits, packed across; a row more than its length must be there", function()
    local d = rp "redpajama_sample"
    local all = kept(100, 300, 1, 30)
    t.eq(d.train.rows, math.floor((total(all) - 1) / 64))
    t.eq(d.validation.rows, math.floor((total(kept(100, 300, 1, 20)) - 1) / 64))
    local row = ids_of(d.train:row(1))
    t.eq(row[1], 1)
    t.eq(d.train:row(1).labels:totable()[1], row) -- everything is learned
    t.eq(rp("redpajama_sample", { use_c4 = true }).train.rows, math.floor((total(kept(100, 300, 2, 30, 2)) - 1) / 64))
    t.errors(rp, "no row of 64 tokens from 0 documents", "redpajama_sample", { min_length = 1e6 })
    t.errors(rp, "train.json is not there; looked for", "redpajama_sample",
             { train_data = { "redpajama/other/train.json" } })
end)

t.test("a cap takes some documents by the seed", function()
    local one = rp("redpajama_sample", { train_data = { "redpajama/train.json[5]" } })
    local two = rp("redpajama_sample", { train_data = { "redpajama/train.json[5]" } })
    local other = rp("redpajama_sample", { train_data = { "redpajama/train.json[5]" }, seed = 1 })
    t.eq(one.train:digest(), two.train:digest())
    t.ok(one.train:digest() ~= other.train:digest())
    t.ok(one.train.rows < rp("redpajama_sample").train.rows)
end)

t.test("within documents: no row crosses an end", function()
    local d = rp "redpajama_sample_contig"
    local want = 0
    for _, n in ipairs(kept(100, 300, 1, 30)) do want = want + math.floor((n - 1) / 64) end
    t.eq(d.train.rows, want)
    for i = 1, d.train.rows do
        local row = ids_of(d.train:row(i))
        for k = 2, 64 do t.ok(row[k] ~= 1, "a document begins inside a row") end
    end
end)

t.test("rows chosen by a ranking, which is computed once and kept", function()
    local more = { filter_by_esl = true, num_train_samples = 4, max_train_samples = 10, chunk_size = 32,
                   min_length = 60 }
    local all = rp("redpajama_sample_contig", { chunk_size = 32, min_length = 60 })
    local d = rp("redpajama_sample_contig", more)
    local name = "d=redpajama_train_50-mts=10-dcs=32-max=300-min=60-s=42.npy"
    local order = esl.read_npy(root .. "/" .. name)
    t.eq(#order, 10)
    local order2, scores = esl.rank(model, all.train, { limit = 10 })
    t.eq(order, order2)
    t.ok(scores[order[1] + 1] >= scores[order[2] + 1])
    t.eq(d.train.rows, 4)
    t.eq(ids_of(d.train:row(1)), ids_of(all.train:row(order[1] + 1)))
    esl.write_npy(root .. "/" .. name, { 3, 0, 1, 2 })
    t.eq(ids_of(rp("redpajama_sample_contig", more).train:row(1)), ids_of(all.train:row(4)))
    esl.write_npy(root .. "/" .. name, { 3000 })
    t.errors(rp, "the ranking names row 3000", "redpajama_sample_contig", more)
    more.num_train_samples = false
    t.errors(rp, "num_train_samples is missing", "redpajama_sample_contig", more)
end)

t.test("the effective length of a row is that of its weights", function()
    local ids = { { 1, 40, 33, 270, 300, 12, 90, 91, 17, 5 } }
    local sum = 0
    lc.no_grad(lc.scope, function()
        local x = model:check_ids(ids)
        local ctx = model:context(x, {})
        local h = lc.embedding(model.embed, x)
        for _, layer in ipairs(model.layers) do
            local n = model:norm_in(layer, h)
            local q, k, v = model:qkv(layer, n, ctx)
            local _, a = attention.quadratic_softmax(q, k, v)
            local list, heads = a:totable()[1], 4
            for head = 1, heads do
                for i = 1, 10 do
                    for j = 1, i do sum = sum + (i - j) * list[head][i][j] / (heads * 10 * #model.layers) end
                end
            end
            h = model:finish(layer, h,
                             attention.softmax(q, k, v, { pos = ctx.pos, layer = layer.index, hidden = n, seen = 0 }),
                             ctx)
        end
    end)
    t.close({ esl.score(model, ids) }, { sum }, 1e-5)
    t.ok(esl.score(model, ids, 1) > esl.score(model, ids))
end)

t.test(".npy files: written as numpy does; others refused", function()
    local path = root .. "/a.npy"
    esl.write_npy(path, { 0, 255, 256, 70000, 2147483647 })
    local s = files.read(path)
    t.eq(#s % 64, 5 * 8 % 64)
    t.eq(esl.read_npy(path), { 0, 255, 256, 70000, 2147483647 })
    for _, bad in ipairs { "", "\147NUMPY\1\0", s:sub(1, -2), (s:gsub("<i8", "<f8")), s:sub(1, -9) .. ("\255"):rep(8),
                           ("x"):rep(200) } do
        files.write(path, bad)
        t.errors(esl.read_npy, "a%.npy", path)
    end
end)

t.test("unknown data sets are named", function()
    t.errors(load, "there is no data set 'pile'; there are alpaca_clean,", { name = "pile" })
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
