-- Data: records of every kind into rows, labels where they belong, packing, hold-out, order, and what is refused.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files, data = lc.files, require "lolcats.data"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)

-- A tokenizer of bytes: id = byte; "~" is the end token.
local bytes = { size = 256 }
function bytes:encode(s, o)
    local ids = { s:byte(1, -1) }
    if o and o.special then table.insert(ids, 1, 1) end -- a BOS
    return ids
end
function bytes:id(s) return s:byte() end

local function text_of(view, keep)
    local out = {}
    for _, id in ipairs(view:reshape(-1):totable()) do
        if id >= 0 then out[#out + 1] = id == 1 and "^" or string.char(id) elseif keep then out[#out + 1] = "_" end
    end
    return table.concat(out)
end

local function write(name, text)
    files.write(root .. "/" .. name, text)
    return root .. "/" .. name
end

t.test("the packing rule is strictly longer", function()
    local s = data.stream()
    s:add({ 1, 2, 3, 4 }, true)
    t.eq(data.pack(s, 4).rows, 0)
    s:add({ 5 }, true)
    local rows = data.pack(s, 4)
    t.eq({ rows.rows, rows.left }, { 1, 1 })
    t.eq(rows:row(1).ids:totable(), { { 1, 2, 3, 4 } })
end)

t.test("rows without a label go; for training also those whose only label is first", function()
    local s = data.stream()
    s:add({ 1, 2, 3, 4 }, false)
    s:add({ 5 }, true)
    s:add({ 6, 7, 8, 9 }, false)
    t.eq(data.pack(s, 4).rows, 1)
    t.eq(data.pack(s, 4, { targets = true }).rows, 0)
end)

t.test("streams grow past their first buffer", function()
    local s, piece = data.stream(), {}
    for i = 1, 5000 do piece[i] = i end
    for _ = 1, 40 do s:add(piece, true) end
    t.eq(s.n, 200000)
    local v = s.ids:narrow(1, 195001, 5000):totable()
    t.eq({ v[1], v[5000] }, { 1, 5000 })
end)

t.test("Alpaca records: prompt without labels, answer and end token with", function()
    local records = {}
    for i = 1, 6 do records[i] = { instruction = "Say " .. i, input = i % 2 == 0 and "loud" or "", output = "<" .. i .. ">" } end
    local rows = lc.data(records, { tokenizer = bytes, eos = "~", seq = 900, shuffle = false })
    local ids, labels = {}, {}
    for i = 1, rows.rows do
        ids[i], labels[i] = text_of(rows:row(i).ids), text_of(rows:row(i).labels)
    end
    t.ok(table.concat(ids):find("^Below is an instruction that describes a task. Write a response that appropriately completes the " ..
        "request.\n\n### Instruction:\nSay 1\n\n### Response:\n<1>~^Below", 1, true), "the prompt is not Alpaca's")
    t.ok(table.concat(ids):find("paired with an input that provides further context. Write", 1, true), "no prompt with input")
    local all = table.concat(labels)
    t.ok(all:find "<1>~" and all:find "<2>~" and not all:find "Say", "labels: " .. all)
end)

t.test("bos = false leaves the tokenizer's own away, a token puts it before each prompt", function()
    local function first(bos)
        local rows = lc.data({ { prompt = "abcdefgh", completion = "xyz" }, { prompt = "a", completion = "b" } },
                             { tokenizer = bytes, eos = "~", seq = 10, bos = bos })
        return text_of(rows:row(1).ids)
    end
    t.eq(first(nil), "^abcdefghx")
    t.eq(first(false), "abcdefghxy")
    t.eq(first "<", "<abcdefghx")
end)

local function render(messages, generation)
    local out = {}
    for _, m in ipairs(messages) do out[#out + 1] = "[" .. m.role:sub(1, 1) .. "]" .. m.content .. "~\n" end
    return table.concat(out) .. (generation and "[a]" or "")
end

t.test("chats: labels on the assistant's turns, end token included", function()
    local record = { messages = { { role = "user", content = "hi" }, { role = "assistant", content = "hello" },
                                  { role = "user", content = "bye" }, { role = "assistant", content = "ciao" } } }
    local rows = lc.data({ record, record }, { tokenizer = bytes, seq = 40, render = render })
    t.eq(text_of(rows:row(1).ids), "[u]hi~\n[a]hello~\n[u]bye~\n[a]ciao~\n[u]hi~")
    t.eq(text_of(rows:row(1).labels, true), "__________hello~____________ciao~_______")
end)

t.test("ShareGPT's spelling of a chat", function()
    local record = { conversations = { { from = "human", value = "hi" }, { from = "gpt", value = "hello" } } }
    local rows = lc.data({ record, record }, { tokenizer = bytes, seq = 20, render = render })
    t.eq(text_of(rows:row(1).labels), "hello~")
end)

t.test("jsonl, json and txt files", function()
    local lines = {}
    for i = 1, 20 do lines[i] = '{"text": "line ' .. i .. '"}' end
    local a = lc.data(write("a.jsonl", table.concat(lines, "\n") .. "\n\n"), { tokenizer = bytes, eos = "~", seq = 16 })
    local b = lc.data(write("a.json", "[" .. table.concat(lines, ",") .. "]"), { tokenizer = bytes, eos = "~", seq = 16 })
    t.eq({ a:digest() }, { b:digest() })
    t.eq(text_of(a:row(1).ids), "^line 1~^line 2~")
    local c = lc.data(write("a.txt", ("some words\n"):rep(30)), { tokenizer = bytes, seq = 16, hold_out = 0.2 })
    t.eq(text_of(c:row(1).ids), "^some words\nsome")
    t.eq(c.targets, c.rows * 15)
    t.ok(c.held.rows >= 3 and c.held.seq == 16)
end)

t.test("held-out records are the first ones and not trained on", function()
    local records = {}
    for i = 1, 40 do records[i] = { text = ("%03d"):format(i):rep(4) } end
    local rows = lc.data(records, { tokenizer = bytes, eos = "~", seq = 13, hold_out = 4 })
    local held, train = {}, {}
    for i = 1, rows.held.rows do held[i] = text_of(rows.held:row(i).ids) end
    for i = 1, rows.rows do train[i] = text_of(rows:row(i).ids) end
    held, train = table.concat(held), table.concat(train)
    t.ok(held:find "%^003" and not held:find "%^005", held)
    t.ok(train:find "%^005" and not train:find "%^003", train)
end)

t.test("an epoch's order is a permutation that depends on seed and epoch alone", function()
    local a, b, c, d = data.order(50, 1, 7), data.order(50, 1, 7), data.order(50, 2, 7), data.order(50, 1, 8)
    t.eq(a, b)
    local seen = {}
    for _, i in ipairs(a) do seen[i] = true end
    t.eq(#seen, 50)
    local function differ(x, y)
        for i = 1, 50 do if x[i] ~= y[i] then return true end end
    end
    t.ok(differ(a, c) and differ(a, d) and differ(c, d))
    t.eq(data.order(3, 1, 7, false), { 1, 2, 3 })
end)

t.test("batches of rows, and rows from ids", function()
    local ids = {}
    for i = 1, 41 do ids[i] = i end
    for _, given in ipairs { ids, lc.tensor(ids, { dtype = "i32" }) } do
        local rows = data.from_ids(given, { seq = 10 })
        t.eq(rows.rows, 4)
        local batch = rows:batch { 3, 1 }
        t.eq(batch.ids:totable()[1][1], 21)
        t.eq(batch.labels:totable()[2][10], 10)
    end
end)

t.test("the digest is that of the rows", function()
    local a = data.from_ids({ 1, 2, 3, 4, 5 }, { seq = 4 })
    t.eq((a:digest()), files.sha256("\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0"))
end)

-- ---- refused ------------------------------------------------------------------------------------------------------
local function refused(name, pattern, source, opts)
    t.test("refused: " .. name, function() t.errors(function() lc.data(source, opts) end, pattern) end)
end
local how = { tokenizer = bytes, eos = "~", seq = 32 }
refused("an unknown ending", "Names of data files end in", write("a.doc", "x"), how)
refused("no such file", "no such file", root .. "/none.json", how)
refused("a parquet file that is none", "a.parquet: not a parquet file", write("a.parquet", "PAR1"), how)
refused("text shorter than a row", "too few for one row of 32", write("short.txt", "a few words"), how)
refused("an empty text", "empty", write("empty.txt", " \n"), how)
refused("records that are none", "an array of records", write("object.json", "{}"), how)
refused("a record of no kind", "record 1.*instruction", { { title = "x" } }, how)
refused("a record without output", "record 1.*'output'", { { instruction = "x" } }, how)
refused("a line that is no JSON", "bad.jsonl:2", write("bad.jsonl", '{"text": "a"}\n{"text": \n'), how)
refused("a typo in an option", "no option 'tokeniser'", { "x" }, { tokeniser = bytes })
refused("no tokenizer", "needs model", { "x" }, {})
refused("all held out", "leaves nothing", { "x", "y" }, { tokenizer = bytes, eos = "~", seq = 4, hold_out = 2 })
refused("an unknown role", "message 1", { { messages = { { role = "narrator", content = "x" } } } }, how)
refused("a chat without a template", "no chat template", { { messages = { { role = "assistant", content = "x" } } } }, how)
refused("no end of answers known", "what ends an answer", { { prompt = "a", completion = "b" } }, { tokenizer = bytes, seq = 4 })
refused("a seq of a half", "whole number", { "x" }, { tokenizer = bytes, seq = 1.5 })

t.test("refused: an id outside the model's vocabulary", function()
    local model = { config = { vocab_size = 100 }, tokenizer = bytes }
    t.errors(function() lc.data({ { text = "abcz" } }, { model = model, seq = 2, eos = "" }) end, "id 122 is outside the model's vocabulary")
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
