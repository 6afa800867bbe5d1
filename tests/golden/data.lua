-- data.lua: Alpaca records through prompt, tokenizer, labels and packing, for every tokenizer that is there; and
-- the packing rule on made-up samples. Exact.
local lc = require "lolcats"
local files = require "lolcats.files"
local data = require "lolcats.data"

-- The tokenizer of a case, a tokenizer.json or a tokenizer.model as Hugging Face's tools run it, and what to put before a prompt.
local opened = {}
local function tokenizer_of(T, case)
    local path = case.tokenizer_file and case.tokenizer_file:match "^[^%s,]+"
    path = path and T.data(path)
    if not path then return nil end
    opened[path] = opened[path] or lc.tokenizer(path, path:match "%.model" and { style = "hf" } or nil)
    local bos = case.bos
    return opened[path], type(bos) == "number" and bos or nil
end

local function stream_of(tok, records, first, last, eos, bos)
    local how = data.resolve { tokenizer = tok, eos = eos, bos = bos }
    local stream = data.stream()
    for i = first, last do data.adders.alpaca(stream, how, records[i], "record " .. i) end
    return stream
end

local function same(c, label, view, want)
    local got = view:reshape(-1):totable()
    local bad = #got ~= #want and "length" or nil
    for i = 1, #want do
        if not bad and got[i] ~= want[i] then bad = ("position %d is %s, expected %d"):format(i, tostring(got[i]), want[i]) end
    end
    c.check(label, not bad, bad)
end

local function compare_rows(c, rows, case)
    local n = rows.rows
    for i, want in ipairs(case.first or {}) do
        same(c, "ids of row " .. i, rows:row(i).ids, want[1])
        same(c, "labels of row " .. i, rows:row(i).labels, want[2])
    end
    local last = case.last or {}
    for i, want in ipairs(last) do
        local at = n - #last + i
        same(c, "ids of row " .. at, rows:row(at).ids, want[1])
        same(c, "labels of row " .. at, rows:row(at).labels, want[2])
    end
end

local function equal(c, label, got, want) c.check(label, got == want, ("%s, expected %s"):format(tostring(got), tostring(want))) end

local function alpaca_cases(dir, T)
    local json = files.read_json(dir .. "/alpaca_packing.json")
    local source = T.data(json.data)
    local streams, records = {}, source and files.read_json(source)
    for _, case in ipairs(json.cases) do
        local name = ("data/alpaca %s %d %s"):format(case.tokenizer, case.chunk_size, case.split)
        local tok, bos = tokenizer_of(T, case)
        if not records or not tok then
            T.skip(name, records and "its tokenizer is not here" or "the records are not here")
        else
            T.case(name, function(c)
                local key = case.tokenizer .. case.split
                if not streams[key] then
                    local held = case.split == "validation"
                    streams[key] = stream_of(tok, records, held and 1 or 201, held and 200 or #records, case.eos, bos)
                end
                local stream = streams[key]
                local rows = data.pack(stream, case.chunk_size)
                equal(c, "tokens", stream.n, case.tokens)
                equal(c, "answer tokens", stream.answers, case.answer_tokens)
                equal(c, "rows", rows.rows, case.chunks)
                equal(c, "rows before the filter", rows.before, case.chunks_before_filter)
                equal(c, "left", rows.left, case.left)
                compare_rows(c, rows, case)
                local ids, labels = rows:digest()
                equal(c, "sha256 of ids", ids, case.sha256_ids)
                equal(c, "sha256 of labels", labels, case.sha256_labels)
            end)
        end
    end
    return source and records, json
end

local function record_cases(dir, T, records, head)
    local json = files.read_json(dir .. "/alpaca_packing.records.json")
    local of = {}
    for _, case in ipairs(head.cases) do of[case.tokenizer] = case end
    local groups, order = {}, {}
    for _, case in ipairs(json.cases) do
        local g = groups[case.tokenizer]
        if not g then
            g = {}
            groups[case.tokenizer], order[#order + 1] = g, case.tokenizer
        end
        g[#g + 1] = case
    end
    for _, name in ipairs(order) do
        local tok, bos
        if of[name] then tok, bos = tokenizer_of(T, of[name]) end
        if not tok or not records then
            T.skip("data/records " .. name, "its tokenizer is not here")
        else
            T.case("data/records " .. name, function(c)
                for _, case in ipairs(groups[name]) do
                    local stream = stream_of(tok, records, case.record + 1, case.record + 1, of[name].eos, bos)
                    local all = {}
                    for _, id in ipairs(case.prompt) do all[#all + 1] = id end
                    for _, id in ipairs(case.answer) do all[#all + 1] = id end
                    equal(c, "answer of record " .. case.record, stream.answers, #case.answer)
                    same(c, "record " .. case.record, stream.ids:narrow(1, 1, stream.n), all)
                end
            end)
        end
    end
end

return function(dir, T)
    local records, head = alpaca_cases(dir, T)
    record_cases(dir, T, records, head)
    for i, case in ipairs(files.read_json(dir .. "/packing_edges.json").cases) do
        T.case("data/edge " .. i, function(c)
            local stream = data.stream()
            for _, s in ipairs(case.samples) do
                stream:add(s.prompt, false)
                stream:add(s.answer, true)
            end
            local rows = data.pack(stream, case.chunk_size)
            equal(c, "rows", rows.rows, #case.chunks)
            equal(c, "rows before the filter", rows.before, case.chunks_before_filter)
            equal(c, "left", rows.left, case.left)
            for r, want in ipairs(case.chunks) do
                same(c, "ids of row " .. r, rows:row(r).ids, want[1])
                same(c, "labels of row " .. r, rows:row(r).labels, want[2])
            end
        end)
    end
end
