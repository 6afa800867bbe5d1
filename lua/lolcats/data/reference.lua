-- reference.lua: the data sets of the reference's configurations (their `dataset` blocks) as training rows: Alpaca
-- packed or not, SAMSum in its form, Alpaca through a chat template, and samples of RedPajama with limits on length,
-- packed across documents or within them and chosen by effective sequence length.
local lc = require "lolcats"
local files = require "lolcats.files"
local data = require "lolcats.data"
local streams = require "lolcats.data.stream"
local log = require "lolcats.log"

local M = {}

-- ---- sources --------------------------------------------------------------------------------------------------------
-- f(record, number) for each record of a file, a data set by name, or a table; it ends the reading by returning true.
local function each_record(source, f)
    local n = 0
    if type(source) == "table" then
        for i, record in ipairs(source) do
            if f(record, i) then return end
        end
        return
    end
    for record in data.each((data.find(source))) do
        n = n + 1
        if f(record, n) then return end
    end
end

local function all_records(source)
    local out = {}
    each_record(source, function(r) out[#out + 1] = r end)
    return out
end

local function part(list, first, last)
    local out = {}
    for i = math.max(1, first), math.min(last, #list) do out[#out + 1] = list[i] end
    return out
end

-- ---- records to rows ------------------------------------------------------------------------------------------------
-- Rows of records that add(stream, how, record, where) writes: packed, or one each.
local function rows_of(records, how, add, seq, name, packed)
    if #records == 0 then lc.fail("%s: there are no records", name) end
    local stream = data.stream(how.vocabulary)
    for i, record in ipairs(records) do
        add(stream, how, record, ("%s: record %d"):format(name, i))
        stream:mark()
    end
    local rows = packed and data.pack(stream, seq, { targets = true }) or
        streams.unpacked(stream, math.huge, 1, #records, how.pad)
    if rows.rows == 0 then
        lc.fail("%s: %d records have %d tokens, too few for one row of %d with something to learn", name, #records,
                stream.n, seq)
    end
    rows.name = name
    return rows
end

local function resolve(opts)
    local how = data.resolve { model = opts.model, tokenizer = opts.tokenizer, eos = opts.eos, render = opts.render }
    if not how.eos then lc.fail("what ends an answer is not known: the model names no end token; give eos =") end
    how.pad = how.tokenizer:id(how.eos) or 0
    return how
end

local function samsum(records)
    local out = {}
    for i, r in ipairs(records) do
        out[i] = { instruction = "Summarize this dialogue.", input = r.dialogue or r.input,
                   output = r.summary or r.output }
    end
    return out
end

local function prompts(records, prompt)
    local out = {}
    for i, r in ipairs(records) do out[i] = { prompt = prompt(r), answer = r.output } end
    return out
end

local LOADERS = {}

-- The first records are held out: 200, or 500 in the configurations for large models.
function LOADERS.alpaca_clean(c, opts)
    local how, name = resolve(opts), opts.source or c.path
    if type(name) ~= "string" then name = "records" end
    local records = all_records(opts.source or c.path)
    if c.name == "samsum" or (records[1] and records[1].dialogue) then records = samsum(records) end
    local held = math.min(opts.hold_out or 200, math.floor(#records / 2))
    local function make(first, last, what)
        return rows_of(part(records, first, last), how, data.adders.alpaca, c.chunk_size or 1024, name .. what,
                       c.concat_data ~= false)
    end
    return { train = make(held + 1, #records, ""), validation = make(1, held, " (held out)"),
             test = prompts(part(records, 1, held), data.alpaca_prompt) }
end

local SYSTEM = "You are a helpful AI assistant who always responds to appropriately complete a user's request."

-- Through the model's chat template; the first and the last hundred records are held out.
function LOADERS.alpaca_clean_instruct(c, opts)
    local how, name = resolve(opts), type(opts.source or c.path) == "string" and (opts.source or c.path) or "records"
    local records = all_records(opts.source or c.path)
    local system = not tostring(opts.model and opts.model.source or ""):find("istral", 1, true)
    local last_id = how.tokenizer:id "<|end_of_text|>"
    local function prompt(r)
        local messages = system and { { role = "system", content = SYSTEM } } or {}
        local input = type(r.input) == "string" and r.input ~= "" and "\n\n" .. r.input or ""
        messages[#messages + 1] = { role = "user", content = r.instruction .. input }
        return how.render(messages, true)
    end
    local function add(stream, _, r)
        stream:add(how.tokenizer:encode(prompt(r), { special = false, parse = true }), false)
        local ids = how.tokenizer:encode((r.output:match "^%s*(.-)%s*$"), { special = false, parse = true })
        ids[#ids + 1] = how.pad
        ids[#ids + 1] = last_id
        stream:add(ids, true)
    end
    local n = math.min(100, math.floor(#records / 4))
    local held = part(records, 1, n)
    for _, r in ipairs(part(records, #records - n + 1, #records)) do held[#held + 1] = r end
    local function make(list, what)
        return rows_of(list, how, add, c.chunk_size or 1024, name .. what, c.concat_data ~= false)
    end
    return { train = make(part(records, n + 1, #records - n), ""), validation = make(held, " (held out)"),
             test = prompts(held, prompt) }
end

-- ---- RedPajama ------------------------------------------------------------------------------------------------------
-- "redpajama/train.json[50000]" -> where the file is, 50000.
local function file_spec(spec, opts, c)
    local path, cap = spec:match "^(.-)%[(%d+)%]$"
    path = path or spec
    local looked = {}
    for _, dir in ipairs { "", "data/long-llm/", (c.cache_dir or ".") .. "/", opts.data_dir and opts.data_dir .. "/" or
                           "" } do
        if files.is_file(dir .. path) then return dir .. path, tonumber(cap) end
        looked[#looked + 1] = dir .. path
    end
    lc.fail("the data file %s is not there; looked for %s (--data_dir DIR or --data FILE says where it is)", path,
            table.concat(looked, ", "))
end

-- Documents within the limits on length, as token ids in one stream: list of {first, n}. limit: records that are looked
-- at; with use_c4 only its records count.
local function documents(stream, how, c, source, limit)
    local out = {}
    local eos = how.pad
    local looked = 0
    local function read(record, n)
        if limit and looked >= limit then return true end
        if type(record.text) ~= "string" then
            lc.fail("%s: record %d has no text (conversations are not part of this data set)", tostring(source), n)
        end
        if c.use_c4 and not tostring(type(record.meta) == "table" and files.to_json(record.meta) or record.meta)
            :find("['\"]source['\"]: ?['\"]c4['\"]") then
            return false
        end
        looked = looked + 1
        local ids = how.tokenizer:encode(record.text, { special = true, parse = true })
        if #ids < c.min_length then return false end
        if #ids < c.max_length then
            if ids[#ids] ~= eos then ids[#ids + 1] = eos end
        else
            ids = { unpack(ids, 1, c.max_length) }
        end
        out[#out + 1] = { stream.n, #ids }
        stream:add(ids, true)
    end
    each_record(source, read)
    return out
end

-- Copies tokens of one stream behind another.
local function copy(from, first, n, to)
    to:reserve(n)
    for i = 0, n - 1 do
        to.p_ids[to.n + i], to.p_labels[to.n + i] = from.p_ids[first + i], from.p_labels[first + i]
    end
    to.n, to.answers = to.n + n, to.answers + n
end

-- One more token at the end: a row leaves only while more than its length is there.
local function close(stream) if stream.n > 0 then copy(stream, stream.n - 1, 1, stream) end end

-- Rows of documents; within: no row goes on from one document to the next.
local function pack_documents(stream, docs, c, within, name)
    local size, out = c.chunk_size, data.stream()
    for _, d in ipairs(docs) do
        local n = within and math.floor((d[2] - 1) / size) * size or d[2]
        if n > 0 then copy(stream, d[1], n, out) end
    end
    if within then close(out) end
    local rows = data.pack(out, size)
    if rows.rows == 0 then
        lc.fail("%s: no row of %d tokens from %d documents of %d to %d tokens", name, size, #docs, c.min_length,
                c.max_length)
    end
    rows.name = name
    return rows
end

local function choose(rows, order, n, name)
    local starts = {}
    for i = 1, math.min(n, #order) do
        local at = rows.starts[order[i] + 1]
        if not at then
            lc.fail("%s: the ranking names row %d; there are %d rows (it belongs to other data)", name, order[i],
                    rows.rows)
        end
        starts[i] = at
    end
    rows.starts, rows.rows, rows.tokens, rows.hash = starts, #starts, #starts * rows.seq, nil
    return rows
end

local function ranking(rows, c, opts)
    local esl = require "lolcats.data.effective_length"
    local name = esl.file_name(c, c.filter_window)
    for _, dir in ipairs { c.dataloaders_dir or ".", opts.data_dir or ".", "." } do
        local path = (dir:gsub("/+$", "")) .. "/" .. name
        if files.is_file(path) then return esl.read_npy(path), path end
    end
    if not opts.model or not opts.model.layers then
        lc.fail("filter_by_esl: there is no file %s, and no model to compute it with", name)
    end
    log.say("ranking %d rows by effective sequence length (softmax attention)",
            math.min(rows.rows, c.max_train_samples))
    local order = esl.rank(opts.model, rows, { limit = c.max_train_samples, queries = c.filter_window })
    local path = (opts.data_dir or ".") .. "/" .. name
    esl.write_npy(path, order)
    return order, path
end

local function redpajama(c, opts, within)
    local how, seed = resolve(opts), c.seed or 42
    for _, k in ipairs { "min_length", "max_length", "chunk_size" } do
        if type(c[k]) ~= "number" then lc.fail("dataset_config.%s is missing", k) end
    end
    local stream, docs, name = data.stream(how.vocabulary), {}, nil
    for _, spec in ipairs(opts.source and { opts.source } or c.train_data) do
        local path, cap = opts.source, tonumber(tostring(c.train_data and c.train_data[1]):match "%[(%d+)%]$")
        if not path then path, cap = file_spec(spec, opts, c) end
        name = name or (type(path) == "string" and path or "records")
        local found = documents(stream, how, c, path)
        if cap and #found > cap then -- a random choice, like train_test_split's; its order is our own generator's
            local order = data.order(#found, 1, seed)
            local chosen = {}
            for i = 1, cap do chosen[i] = found[order[i]] end
            found = chosen
        end
        for _, d in ipairs(found) do docs[#docs + 1] = d end
    end
    local train = pack_documents(stream, docs, c, within, name)
    stream.ids:drop() -- its rows were copied
    stream.labels:drop()
    if within and c.filter_by_esl then
        if not c.num_train_samples then lc.fail("dataset_config.num_train_samples is missing") end
        local order, path = ranking(train, c, opts)
        choose(train, order, c.num_train_samples, path)
    end
    local held_stream = data.stream(how.vocabulary)
    local held_path = opts.source or file_spec(c.eval_data[1], opts, c)
    local held = documents(held_stream, how, c, held_path, c.max_eval_num or 1000)
    local validation = pack_documents(held_stream, held, c, within, name .. " (held out)")
    held_stream.ids:drop()
    held_stream.labels:drop()
    return { train = train, validation = validation }
end

function LOADERS.redpajama_sample(c, opts) return redpajama(c, opts, false) end
function LOADERS.redpajama_sample_contig(c, opts) return redpajama(c, opts, true) end

--- Rows of a configuration's `dataset` block: {train =, validation =, test = {{prompt =, answer =}} where there is
--- one}. opts: model (its tokenizer, template and end token; ranks rows where that is asked for), source (a file or
--- records instead of what the block names), data_dir, hold_out.
function M.load(dataset, opts)
    local load = LOADERS[dataset.name]
    if not load then
        local names = {}
        for k in pairs(LOADERS) do names[#names + 1] = k end
        table.sort(names)
        lc.fail("there is no data set '%s'; there are %s", tostring(dataset.name), table.concat(names, ", "))
    end
    return load(dataset.dataset_config or {}, opts)
end

M.LOADERS = LOADERS
return M
