-- Readers of records: what they give, and where they say that something is wrong; data sets in folders and on a Hub; rows kept in
-- files against the same rows in memory. The parquet files are those that the fuzzer begins with (written by pyarrow).
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local here = (arg and arg[0] or ""):match("^(.*/)")
local ffi = require "ffi"
local lc = require "lolcats"
local files, data = lc.files, require "lolcats.data"
ffi.cdef "int setenv(const char *, const char *, int);"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)
ffi.C.setenv("XDG_CACHE_HOME", root .. "/cache", 1)
local NULL = files.null

local function write(name, text)
    files.make_dirs(files.dirname(root .. "/" .. name))
    local file = io.open(root .. "/" .. name, "wb") -- not synced: there are hundreds
    file:write(text)
    file:close()
    return root .. "/" .. name
end
-- A file of the fuzzer's corpus without its first byte, which names the format.
local function sample(name, as)
    return write(as, files.read(here .. "../c/corpus/fuzz_records/" .. name):sub(2))
end
local function all(name, text) return data.records(write(name, text)) end
local function wrong(name, text, pattern)
    t.test("refused: " .. name, function() t.errors(function() all(name, text) end, pattern) end)
end

-- ---- text formats -------------------------------------------------------------------------------------------------
t.test("lines of JSON, with blank ones and a byte order mark", function()
    t.eq(all("a.jsonl", '\239\187\191{"a": 1}\r\n\n  \n[1, null]\n"x"'), { { a = 1 }, { 1, NULL }, "x" })
    t.eq(all("none.jsonl", ""), {})
end)

t.test("a JSON text: one array, values one after another, an object that holds the records", function()
    t.eq(all("a.json", ' [ {"a": "]}"}, [1, [2]], "x,", 3 , true]\n'), { { a = "]}" }, { 1, { 2 } }, "x,", 3, true })
    t.eq(all("b.json", '{"a": 1}\n{"a": 2} "z" 5'), { { a = 1 }, { a = 2 }, "z", 5 })
    t.eq(all("c.json", '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'), { { text = "a" }, { text = "b" } })
    t.eq(all("d.json", "[]"), {})
end)

t.test("CSV: quotes, line breaks in fields, empty lines, tabs", function()
    t.eq(all("a.csv", 'name,text\na,"two\nlines, ""quoted"""\r\n\nb,\n"",x'),
         { { name = "a", text = 'two\nlines, "quoted"' }, { name = "b", text = "" }, { name = "", text = "x" } })
    t.eq(all("a.tsv", "a\tb\n1\t2, 3\n"), { { a = "1", b = "2, 3" } })
end)

t.test("packed files: gzip in several members, Zstandard", function()
    t.eq(data.records(sample("jsonl_gz", "p.jsonl.gz")), { { a = 1 }, { a = 2 } })
    t.eq(data.records(sample("jsonl_zst", "p.jsonl.zst")), { { a = 1 }, { a = 2 } })
    t.eq(data.records(sample("jsonl_gz", "named_otherwise.jsonl")), { { a = 1 }, { a = 2 } }) -- by content
end)

t.test("large files in small pieces", function()
    local line = '{"text": "' .. ("word "):rep(200) .. '"}'
    local path = write("large.jsonl", (line .. "\n"):rep(3000))
    local n = 0
    for record in data.each { path } do n = n + #record.text end
    t.eq(n, 3000000)
    path = write("large.json", "[" .. (line .. ","):rep(2999) .. line .. "]")
    t.eq(#data.records(path), 3000)
    local pieces = data.records(write("large.txt", ("a line of words\n"):rep(600000)))
    t.ok(#pieces == 3 and pieces[1]:sub(-1) == "\n" and #table.concat(pieces) == 9600000, #pieces .. " pieces")
end)

wrong("bad1.jsonl", '{"a": 1}\n\n{"a": }\n', "bad1.jsonl:3:%d: not valid JSON")
wrong("bad2.jsonl", '{"a": 1, "a": 2}\n', "occurs twice")
wrong("bad3.jsonl", '"\255"\n', "bad3.jsonl:1:2: not valid JSON: invalid UTF%-8")
wrong("bad4.jsonl", ("["):rep(300), "nested more than 256 deep")
wrong("bad1.json", '[{"a": 1},\n {"a": x}]', "bad1.json:2:%d: not valid JSON")
wrong("bad2.json", "[1,\n2", "bad2.json:2:2: not valid JSON: .*cut short")
wrong("bad3.json", "[1 2]", "bad3.json:1:4: .*expected , or %]")
wrong("bad4.json", "[1,]", "bad4.json:1:4: .*expected a value")
wrong("bad5.json", "[1] 2", "bad5.json:1:5: .*follows the array")
wrong("bad6.json", "[1}", "bad6.json:1:3")
wrong("bad1.csv", "a,b\n1,2\n\n1,2,3\n", "bad1.csv:4: 3 fields where the header has 2")
wrong("bad2.csv", 'a,b\n1,"2\n3\n', "bad2.csv:2:3: .*not closed")
wrong("bad3.csv", 'a,b\n1,"2"x\n', "bad3.csv:2:6: .*after the closing quote")
wrong("bad4.csv", "a,a\n1,2\n", "'a' occurs twice in the header")
wrong("bad5.csv", "a\nx\n\255\n", "bad5.csv:3:1: .*invalid UTF%-8")
wrong("bad6.csv", "", "the file is empty")
wrong("bad1.txt", "fine\nnot \255 fine", "bad1.txt:2:5: invalid UTF%-8")
t.test("refused: damaged and cut packed files", function()
    local gz = files.read(sample("jsonl_gz", "cut.jsonl.gz"))
    t.errors(function() all("cut.jsonl.gz", gz:sub(1, 20)) end, "cut.jsonl.gz: damaged gzip data before byte 20: they are cut short")
    t.errors(function() all("bent.jsonl.gz", gz:sub(1, 12) .. "\255\255" .. gz:sub(15)) end, "damaged gzip")
    local zst = files.read(sample("jsonl_zst", "cut.jsonl.zst"))
    t.errors(function() all("cut.jsonl.zst", zst:sub(1, -3)) end, "damaged Zstandard data.*cut short")
end)

-- ---- parquet ------------------------------------------------------------------------------------------------------
local ROWS = {
    { s = "a", n = 1, l = { "x" }, m = { { role = "u", content = "c" } }, b = true, f = 0.5 },
    { s = "b", n = 2, l = {}, m = NULL, b = false, f = NULL },
    { s = NULL, n = 3, l = NULL, m = {}, b = NULL, f = 1.5 },
    { s = "a", n = NULL, l = { "y", "z" }, m = { { role = "a", content = NULL } }, b = true, f = 2.5 },
}
for _, name in ipairs { "plain", "snappy", "zstd", "gzip", "delta" } do
    t.test("parquet, " .. name, function() t.eq(data.records(sample("parquet_" .. name, name .. ".parquet")), ROWS) end)
end

t.test("parquet, lists as old writers have them", function()
    t.eq(data.records(sample("parquet_old_lists", "old.parquet")), {
        { l = { 1, 2 }, r = { 7 }, g = { { a = 1 }, { a = NULL } }, t = { { x = 5 }, { x = 6 } } },
        { l = NULL, r = {}, g = {}, t = {} },
        { l = {}, r = { 8, 9 }, g = NULL, t = NULL },
        { l = { 3 }, r = {}, g = { { a = 2 } }, t = { { x = 4 } } },
    })
end)

t.test("refused: parquet cut anywhere, and bent anywhere without a crash", function()
    local text = files.read(sample("parquet_plain", "whole.parquet"))
    for n = 0, #text - 1, 37 do t.errors(function() all("cut.parquet", text:sub(1, n)) end, "cut.parquet") end
    for n = 1, #text, 5 do
        local ok, why = pcall(all, "bent.parquet", text:sub(1, n - 1) .. string.char((text:byte(n) + 128) % 256) .. text:sub(n + 1))
        t.ok(ok or tostring(why):find("bent.parquet", 1, true), tostring(why))
    end
    local zstd = files.read(sample("parquet_zstd", "sum.parquet"))
    local found = 0
    for n = 1, #zstd do
        local ok, why = pcall(all, "sum.parquet", zstd:sub(1, n - 1) .. string.char((zstd:byte(n) + 1) % 256) .. zstd:sub(n + 1))
        if not ok and tostring(why):find "sum.parquet: row %d: a page's checksum" then found = found + 1 end
    end
    t.ok(found > 100, found .. " changes were seen by their checksum")
end)

-- ---- data sets ----------------------------------------------------------------------------------------------------
t.test("a folder as a data set: splits by name", function()
    write("set/data/train-00000-of-00002.jsonl", '{"text": "a"}\n')
    write("set/data/train-00001-of-00002.jsonl", '{"text": "b"}\n')
    write("set/data/test-00000-of-00001.jsonl", '{"text": "c"}\n')
    write("set/README.md", "no list\n")
    t.eq(data.records(root .. "/set"), { { text = "a" }, { text = "b" } })
    t.eq(data.records(root .. "/set", { split = "test" }), { { text = "c" } })
    t.errors(function() data.records(root .. "/set", { split = "validation" }) end, "no split 'validation'; it has test, train")
    write("only/rows.csv", "text\nx\n")
    t.eq(data.records(root .. "/only"), { { text = "x" } })
    write("empty/program.py", "")
    t.errors(function() data.records(root .. "/empty") end, "no file of records")
end)

t.test("names that are no data", function()
    t.errors(function() data.records(root .. "/missing.jsonl") end, "there is no such file")
    t.errors(function() data.records "some/where.parquet" end, "there is no such file")
    t.errors(function() data.records("owner/name", { offline = true }) end, "Hugging Face cache.*datasets%-%-owner%-%-name")
    t.errors(function() data.records "nothing" end, "neither a data set of a Hub")
    write("odd/README.md", "---\na: [b\n---\n")
    write("odd/rows.jsonl", '{"text": "a"}\n')
    t.eq(data.records(root .. "/odd"), { { text = "a" } })
end)

t.test("a folder as a data set: configs by its card", function()
    local card = [[
---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: "main/**/t*.jsonl"
  - split: eval
    path: ["main/e?.jsonl", "main/{x,y}[12].jsonl"]
- config_name: other
  data_dir: other
---
text
]]
    for _, name in ipairs { "main/deep/t1.jsonl", "main/t2.jsonl", "main/e1.jsonl", "main/y2.jsonl", "main/z2.jsonl", "other/test.jsonl", "other/r.jsonl" } do
        write("card/" .. name, '{"text": "' .. name .. '"}\n')
    end
    write("card/README.md", card)
    local function names(opts)
        local out = {}
        for i, r in ipairs(data.records(root .. "/card", opts)) do out[i] = r.text end
        return out
    end
    t.eq(names { config = "main" }, { "main/deep/t1.jsonl", "main/t2.jsonl" })
    t.eq(names { config = "main", split = "eval" }, { "main/e1.jsonl", "main/y2.jsonl" })
    t.eq(names { config = "other" }, { "other/r.jsonl" })
    t.eq(names { config = "other", split = "test" }, { "other/test.jsonl" })
    t.errors(function() names {} end, "which config%? .*main, other")
    t.errors(function() names { config = "third" } end, "no config 'third'; it has main, other")
end)

-- ---- rows in files ------------------------------------------------------------------------------------------------
local bytes = { size = 256 }
function bytes:encode(s, o)
    local ids = {}
    for i = 1, #s do ids[i] = s:byte(i) end
    if o and o.special then table.insert(ids, 1, 1) end
    return ids
end
function bytes:id(s) return s:byte() end
local lines = {}
for i = 1, 500 do lines[i] = ('{"prompt": "q%d", "completion": "%s"}'):format(i, ("a"):rep(i % 17)) end
local pairs_file = write("pairs.jsonl", table.concat(lines, "\n"))
local text_file = write("words.txt", ("some words and more\n"):rep(2000))
local function rows(path, o)
    o.tokenizer, o.eos, o.quiet, o.seq = bytes, "~", true, o.seq or 32
    return lc.data(path, o)
end
local function same(path, o)
    o.cache = false
    local memory = rows(path, o)
    o.cache = true
    local kept = rows(path, o)
    t.ok(kept.stream.path and not memory.stream.path)
    t.eq({ kept.rows, kept.left, kept.before, kept.tokens, kept.targets }, { memory.rows, memory.left, memory.before, memory.tokens, memory.targets })
    t.eq({ kept:digest() }, { memory:digest() })
    if memory.held then t.eq({ kept.held:digest() }, { memory.held:digest() }) end
    local a, b = kept:batch { 1, kept.rows }, memory:batch { 1, memory.rows }
    t.eq(a.ids:totable(), b.ids:totable())
    t.eq(a.labels:totable(), b.labels:totable())
    return kept
end

t.test("rows kept in a file are those made in memory", function()
    same(pairs_file, {})
    same(pairs_file, { hold_out = 0.1 })
    same(pairs_file, { hold_out = 7, seq = 11 })
    same(pairs_file, { limit = 50 })
    same(pairs_file, { learn = "all" })
    same(pairs_file, { pack = false, hold_out = 20 })
    same(pairs_file, { pack = false, seq = 6 })
    same(text_file, { hold_out = 0.2 })
end)

t.test("more records than one block of their ends", function()
    local many = {}
    for i = 1, 9000 do many[i] = ('{"text": "%s"}'):format(("b"):rep(i % 7 + 1)) end
    local path = write("many.jsonl", table.concat(many, "\n"))
    same(path, { hold_out = 4100 })
    same(path, { pack = false, hold_out = 4500 })
end)

t.test("a cache is found again, and not for other bytes, formats or tokenizers", function()
    local first = rows(pairs_file, { cache = true })
    t.eq(rows(pairs_file, { cache = true, hold_out = 5, seq = 9 }).stream.path, first.stream.path)
    local copy = write("moved.jsonl", files.read(pairs_file))
    t.eq(rows(copy, { cache = true }).stream.path, first.stream.path)
    local other = write("other.jsonl", files.read(pairs_file) .. "\n" .. lines[1])
    t.ok(rows(other, { cache = true }).stream.path ~= first.stream.path)
    t.ok(rows(pairs_file, { cache = true, learn = "all" }).stream.path ~= first.stream.path)
    local shifted = setmetatable({ encode = function(self, s, o) return bytes:encode(s:upper(), o) end }, { __index = bytes })
    local kept = lc.data(pairs_file, { tokenizer = shifted, eos = "~", quiet = true, cache = true, seq = 32 })
    t.ok(kept.stream.path ~= first.stream.path)
end)

t.test("a damaged cache is made anew; one that breaks off leaves nothing", function()
    local first = rows(pairs_file, { cache = true })
    local want = first:digest()
    files.write(first.stream.path .. ".ids", "short")
    t.eq((rows(pairs_file, { cache = true }):digest()), want)
    local bad = write("breaks.jsonl", lines[1] .. "\n" .. lines[2] .. "\n{")
    t.errors(function() rows(bad, { cache = true }) end, "breaks.jsonl:3")
    for _, name in ipairs(files.list(root .. "/cache/lolcats/tokens")) do t.ok(not name:find "part", name) end
end)

t.test("a function's format: any record, left out records, kept under a name", function()
    local function mine(r) if tonumber(r.prompt:sub(2)) % 2 == 0 then return { prompt = r.prompt:upper(), completion = "!" } end end
    local made = rows(pairs_file, { format = mine, seq = 10 })
    local text = {}
    for _, id in ipairs(made:row(1).ids:reshape(-1):totable()) do text[#text + 1] = string.char(id) end
    t.eq(table.concat(text), "\1Q2!~\1Q4!~")
    t.errors(function() rows(pairs_file, { format = mine, cache = true }) end, "under a name that stands for it")
    local kept = rows(pairs_file, { format = mine, cache = "mine-1", seq = 10 })
    t.ok(kept.stream.path)
    t.eq((kept:digest()), (made:digest()))
end)

t.test("rows that are not packed: one a record, cut, padded on the right", function()
    local made = rows(pairs_file, { pack = false, pad = 7, seq = 12, shuffle = false })
    t.eq(made:row(1).ids:totable(), { { 1, ("q1a~"):byte(1, -1) } })
    local batch = made:batch { 1, 16 }
    t.eq(batch.lengths, { 5, 12 })
    t.eq(batch.ids:totable()[1], { 1, 113, 49, 97, 126, 7, 7, 7, 7, 7, 7, 7 })
    t.eq(batch.labels:totable()[1][6], -100)
    t.errors(function() rows(text_file, { pack = false }) end, "a plain text is packed")
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
