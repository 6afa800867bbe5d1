-- data.lua: lc.data: text to training rows. Finds the records (data/source.lua), makes tokens of them (data/format.lua), in memory
-- or in a file that is kept (data/cache.lua), and cuts rows out of these, with a part held out (data/stream.lua).
local lc = require "lolcats"
local files = require "lolcats.files"
local tensors = require "lolcats.core.tensor"
local log = require "lolcats.log"
local streams = require "lolcats.data.stream"
local format = require "lolcats.data.format"
local source = require "lolcats.data.source"

local M = { stream = streams.stream, pack = streams.pack, order = streams.order, Rows = streams.Rows, Stream = streams.Stream,
            IGNORE = streams.IGNORE, adders = format.adders, resolve = format.resolve, alpaca_prompt = format.alpaca_prompt,
            records = source.records, each = source.each, find = source.find }

local KNOWN = { model = true, tokenizer = true, seq = true, hold_out = true, limit = true, format = true, eos = true, bos = true,
                shuffle = true, render = true, config = true, split = true, revision = true, offline = true, quiet = true, cache = true,
                pack = true, pad = true, learn = true }

local function too_short(name, n, seq, what)
    lc.fail("%s: %s has %d tokens, too few for one row of %d (a row needs one more than its length); take a smaller seq or more text",
            name, what, n, seq)
end

-- ---- rows of a part -------------------------------------------------------------------------------------------------
local function finish(rows, n, seq, name, opts, what)
    if rows.before == 0 then too_short(name, n, seq, what) end
    if rows.rows == 0 then lc.fail("%s: no row of %s has a label to learn", name, what) end
    rows.name = name
    if opts.shuffle == false then rows.shuffle = false end
    return rows
end

local function packed(stream, from, upto, seq, name, opts, what)
    return finish(streams.pack(stream, seq, { targets = true, from = from, upto = upto }), upto - from, seq, name, opts, what)
end

-- Records first to last of a stream.
local function part(stream, first, last, seq, name, opts, what)
    local from, upto = stream:record_start(first), stream:record_start(last + 1)
    if opts.pack ~= false then return packed(stream, from, upto, seq, name, opts, what) end
    return finish(streams.unpacked(stream, seq, first, last, opts.pad), upto - from, seq, name, opts, what)
end

-- How many of n records are held out.
local function held_count(hold_out, n, name)
    if not hold_out or hold_out == 0 then return 0 end
    if type(hold_out) ~= "number" or hold_out < 0 or (hold_out >= 1 and hold_out % 1 ~= 0) then
        lc.fail("hold_out: a share below 1 or a whole number of records, got %s", tostring(hold_out))
    end
    local k = hold_out < 1 and math.max(1, math.ceil(hold_out * n)) or hold_out
    if k >= n then lc.fail("%s: %d of %d records held out leaves nothing to train on", name, k, n) end
    return k
end

-- What is held out of records are the first ones.
local function rows_of_records(stream, opts, name, seq)
    local n = stream:records()
    if n == 0 then lc.fail("%s: no records", name) end
    local k = held_count(opts.hold_out, n, name)
    local train = part(stream, k + 1, n, seq, name, opts, "the training part")
    if k > 0 then train.held = part(stream, 1, k, seq, name .. " (held out)", opts, "the held-out part") end
    return train
end

-- A text is one stream; what is held out is its end.
local function rows_of_text(stream, opts, name, seq)
    local n, hold_out = stream.n, opts.hold_out
    if not hold_out or hold_out == 0 then return packed(stream, 0, n, seq, name, opts, "the text") end
    local want = math.max(hold_out < 1 and math.ceil(hold_out * n) or hold_out * seq + 1, seq + 1)
    if n - want <= seq then too_short(name, n, seq, "the text (with a part held out)") end
    local train = packed(stream, 0, n - want, seq, name, opts, "the text")
    train.held = packed(stream, n - want, n, seq, name .. " (held out)", opts, "the held-out part")
    return train
end

-- ---- tokens of a source ---------------------------------------------------------------------------------------------
local function from_table(records, how, opts, seq)
    local stream, n = streams.stream(how.vocabulary), math.min(#records, opts.limit or math.huge)
    if n == 0 then lc.fail("records: no records") end
    held_count(opts.hold_out, n, "records") -- before the work
    for i = 1, n do format.add(stream, how, records[i], opts.format, "records: record " .. i, "records") end
    return rows_of_records(stream, opts, "records", seq)
end

-- One line about how far it is, every ten seconds.
local function watch(name, stream, opts)
    local last = lc.now()
    return function(count)
        if count % 64 ~= 0 or opts.quiet then return end
        local now = lc.now()
        if now - last < 10 then return end
        last = now
        log.say("%s: %s records, %s tokens", name, log.count(count), log.count(stream.n))
    end
end

local function fill_text(stream, how, paths)
    local is_first, any = true, false
    for piece in source.each(paths) do
        if lc.interrupted() then lc.fail("interrupted") end
        any = any or piece:find "%S" ~= nil
        format.add_text(stream, how, piece, is_first)
        is_first = false
    end
    if not any then lc.fail("%s: the text is empty", paths[1]) end
end

local function fill_records(stream, how, paths, opts, name)
    local count, tick = 0, watch(name, stream, opts)
    for record, where in source.each(paths) do
        if count >= (opts.limit or math.huge) then break end
        if type(record) == "table" and next(record) == nil then lc.fail("%s: an array of records was expected, got an empty value", where) end
        count = count + 1
        format.add(stream, how, record, opts.format, where, name)
        tick(count)
    end
end

-- Is the result kept in a file, and where? nil: it is made in memory.
local function cache_path(paths, how, opts)
    local cache = require "lolcats.data.cache"
    if opts.cache == false then return nil end
    if opts.cache == nil and (type(opts.format) == "function" or opts.render or cache.bytes(paths) < cache.least) then return nil end
    if (type(opts.format) == "function" or opts.render) and type(opts.cache) ~= "string" then
        lc.fail("lc.data: what a function makes of records is kept only under a name that stands for it: cache = \"my-format-1\"")
    end
    return cache.path(paths, how, opts, type(opts.cache) == "string" and opts.cache or nil)
end

local function tokens_of(paths, how, opts, name, fill)
    local path = cache_path(paths, how, opts)
    if not path then
        local stream = streams.stream(how.vocabulary)
        fill(stream)
        return stream
    end
    local store, found = require("lolcats.data.cache").get(path, how.vocabulary, { source = name }, fill)
    if not opts.quiet then log.say("%s: %s tokens %s %s", name, log.count(store.n), found and "from" or "kept in", path .. ".ids") end
    return store
end

local function from_files(given, opts, seq)
    local how = format.resolve(opts)
    local paths, kind = source.find(given, opts)
    local name = given
    if kind == "text" then
        if opts.pack == false then lc.fail("%s: a plain text is packed; pack = false is for records", name) end
        local stream = tokens_of(paths, how, opts, name, function(to) fill_text(to, how, paths) end)
        return rows_of_text(stream, opts, name, seq)
    end
    return rows_of_records(tokens_of(paths, how, opts, name, function(to) fill_records(to, how, paths, opts, name) end), opts, name, seq)
end

--- Training rows from a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; also .gz and .zst), a folder of such, a data set of a Hub
--- ("owner/name", "owner/name:config:split"), "chitchat" (conversations, fetched once with pip), or a table of records or texts.
--- opts: model (its tokenizer, chat template and end token) or tokenizer; seq (tokens a row, 1024); hold_out (a share, or a number of
--- records: the first ones; of a text, the end); config, split, revision (of a data set); limit (records); format ("alpaca", "chat",
--- "prompt", "text", or a function that makes one of these of a record); eos, bos (false: none; a token: before each prompt); learn
--- ("answers", or "all": prompts too); pack (true; false: a row a record, at most seq tokens), pad (an id); shuffle (true); cache
--- (tokens are kept in a file: true, false, or the name of a function's format; by default those of sources from 32 MB on).
--- Returns rows with .held; rows:batch{i, ...}, rows:order(epoch, seed), rows:list(n).
function M.data(given, opts)
    opts = opts or {}
    for k in pairs(opts) do
        if not KNOWN[k] then
            local names = {}
            for name in pairs(KNOWN) do names[#names + 1] = name end
            table.sort(names)
            lc.fail("lc.data has no option '%s'; it has %s", tostring(k), table.concat(names, ", "))
        end
    end
    local seq = opts.seq or 1024
    if type(seq) ~= "number" or seq < 2 or seq % 1 ~= 0 then lc.fail("lc.data: seq is a whole number of at least 2, got %s", tostring(seq)) end
    if type(given) == "table" then return from_table(given, format.resolve(opts), opts, seq) end
    if type(given) ~= "string" then lc.fail("lc.data: a file or a table of records, got a %s", type(given)) end
    return from_files(given, opts, seq)
end

--- Rows from ids (a table, or an integer tensor of one dim): every token is learned. opts: seq, hold_out, vocabulary, shuffle, name.
function M.from_ids(ids, opts)
    local stream = streams.stream(opts.vocabulary)
    if lc.is_tensor(ids) then
        local x = ids:to("i32"):contiguous()
        local buf, n = tensors.to_host(x)
        stream:reserve(n)
        for i = 0, n - 1 do stream.p_ids[i], stream.p_labels[i] = buf[i], buf[i] end
        stream.n, stream.answers = n, n
    else
        stream:add(ids, true)
    end
    return rows_of_text(stream, opts, opts.name or "ids", opts.seq or 1024)
end

return M
