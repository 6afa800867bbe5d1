-- data.lua: text to training rows. Reads .json, .jsonl, .txt, Lua tables and the conversations of a package on PyPI; turns
-- records into prompt and answer (Alpaca's template, a chat template, plain text), tokens and labels; packs them into rows of one
-- length by the reference's rule; splits off what is held out; gives the order of rows of an epoch. Token streams are int32
-- tensors; a row is a view of its stream.
local lc = require "lolcats"
local files = require "lolcats.files"
local bit = require "bit"
local tensors = require "lolcats.core.tensor"

local M = {}

local IGNORE = -100

-- ---- streams: growing int32 buffers of ids and labels -------------------------------------------------------------
local Stream = {}
Stream.__index = Stream

local function buffer(n) return lc.keep(lc.empty({ n }, { dtype = "i32", device = "cpu" })) end

function M.stream(vocabulary)
    local self = setmetatable({ n = 0, room = 65536, answers = 0, vocabulary = vocabulary or math.huge }, Stream)
    self.ids, self.labels = buffer(self.room), buffer(self.room)
    self.p_ids, self.p_labels = self.ids:data(), self.labels:data()
    return self
end

function Stream:reserve(more)
    if self.n + more <= self.room then return end
    local room = math.max(2 * self.room, self.n + more)
    lc.no_grad(lc.scope, function()
        for _, name in ipairs { "ids", "labels" } do
            local old, new = self[name], buffer(room)
            if self.n > 0 then new:narrow(1, 1, self.n):copy_(old:narrow(1, 1, self.n)) end
            self[name], self["p_" .. name] = new, new:data()
            old:drop()
        end
    end)
    self.room = room
end

--- Appends ids; `learn`: they are what the model learns to say, else their labels are -100.
function Stream:add(ids, learn)
    local n, at = #ids, self.n
    self:reserve(n)
    local p, l, top = self.p_ids, self.p_labels, self.vocabulary
    for i = 1, n do
        local id = ids[i]
        if id < 0 or id >= top then
            lc.fail("token id %d is outside the model's vocabulary (0 to %d): tokenizer and model do not belong together", id, top - 1)
        end
        p[at + i - 1] = id
        l[at + i - 1] = learn and id or IGNORE
    end
    self.n = at + n
    if learn then self.answers = self.answers + n end
end

-- ---- rows ---------------------------------------------------------------------------------------------------------
local Rows = {}
Rows.__index = Rows

--- Rows of `size` tokens of a stream: a row leaves while strictly more than its length is there, the rest is dropped, and so are
--- rows without a label. opts.targets: also rows whose only label is their first token, which nothing predicts.
function M.pack(stream, size, opts)
    local before = math.max(0, math.floor((stream.n - 1) / size))
    local starts, labels, first = {}, stream.p_labels, opts and opts.targets and 1 or 0
    local targets = 0
    for r = 0, before - 1 do
        local count = 0
        for i = first, size - 1 do
            if labels[r * size + i] ~= IGNORE then count = count + 1 end
        end
        if count > 0 then starts[#starts + 1] = r * size end
        targets = targets + count
    end
    return setmetatable({
        stream = stream, seq = size, starts = starts, rows = #starts, before = before, left = stream.n - before * size,
        tokens = #starts * size, targets = targets,
    }, Rows)
end

--- Row i (from 1) as {ids = [1, seq], labels = [1, seq]}: views.
function Rows:row(i)
    if type(i) ~= "number" or i < 1 or i > self.rows then lc.fail("row %s: there are %d rows", tostring(i), self.rows) end
    local at = self.starts[i] + 1
    return { ids = self.stream.ids:narrow(1, at, self.seq):reshape(1, self.seq),
             labels = self.stream.labels:narrow(1, at, self.seq):reshape(1, self.seq), index = i }
end

--- Several rows as one batch: ids and labels [n, seq].
function Rows:batch(list)
    if #list == 1 then return self:row(list[1]) end
    local ids, labels = {}, {}
    for k, i in ipairs(list) do
        local row = self:row(i)
        ids[k], labels[k] = row.ids, row.labels
    end
    return { ids = lc.cat(ids, 1), labels = lc.cat(labels, 1), index = list[1] }
end

--- The first `limit` rows (all without), for evaluation.
function Rows:list(limit)
    local out = {}
    for i = 1, math.min(limit or self.rows, self.rows) do out[i] = lc.keep(self:row(i)) end
    return out
end

--- sha256 over the rows' ids and over their labels, as little-endian int32.
function Rows:digest()
    if not self.hash then
        local n = #self.starts
        local ids, labels = buffer(math.max(1, n * self.seq)), buffer(math.max(1, n * self.seq))
        local p, q, s = ids:data(), labels:data(), self.stream
        for r = 1, n do
            for i = 0, self.seq - 1 do
                p[(r - 1) * self.seq + i] = s.p_ids[self.starts[r] + i]
                q[(r - 1) * self.seq + i] = s.p_labels[self.starts[r] + i]
            end
        end
        if n == 0 then
            self.hash = { files.sha256 "", files.sha256 "" }
        else
            self.hash = { files.sha256(ids), files.sha256(labels) }
        end
        ids:drop()
        labels:drop()
    end
    return self.hash[1], self.hash[2]
end

-- A small generator of its own (Marsaglia's xorshift128), so that an order depends on the seed and the epoch alone.
local function generator(seed, epoch)
    local x, y, z, w = bit.tobit(seed % 4294967296), bit.tobit(math.floor(seed / 4294967296) + 0x6c078965), bit.tobit(epoch), 0x5bd1e995
    local function draw()
        local t = bit.bxor(x, bit.lshift(x, 11))
        x, y, z = y, z, w
        w = bit.bxor(w, bit.rshift(w, 19), t, bit.rshift(t, 8))
        return w % 4294967296
    end
    for _ = 1, 32 do draw() end
    return draw
end

--- The rows in the order of an epoch (from 1): shuffled from the seed, or as they stand with shuffle = false.
function M.order(n, epoch, seed, shuffle)
    local list = {}
    for i = 1, n do list[i] = i end
    if shuffle == false then return list end
    local draw = generator(seed or 0, epoch)
    for i = n, 2, -1 do
        local j = 1 + math.floor(draw() / 4294967296 * i)
        list[i], list[j] = list[j], list[i]
    end
    return list
end
function Rows:order(epoch, seed) return M.order(self.rows, epoch, seed, self.shuffle) end

--- What the rows are, for comparing runs.
function Rows:describe()
    return { source = self.name, rows = self.rows, seq = self.seq, ids_sha256 = (self:digest()) }
end

function Rows:__tostring()
    return ("%s: %d rows of %d tokens, %d of them learned%s"):format(self.name or "rows", self.rows, self.seq, self.targets,
        self.held and ("; %d rows held out"):format(self.held.rows) or "")
end

-- ---- records to prompt and answer ---------------------------------------------------------------------------------
local HEAD = "Below is an instruction that describes a task"
local TAIL = "Write a response that appropriately completes the request.\n\n### Instruction:\n"

--- Alpaca's prompt: with or without an input. Fields go in as they are.
function M.alpaca_prompt(record)
    local input = record.input
    if type(input) == "string" and input ~= "" then
        return HEAD .. ", paired with an input that provides further context. " .. TAIL .. record.instruction ..
               "\n\n### Input:\n" .. input .. "\n\n### Response:\n"
    end
    return HEAD .. ". " .. TAIL .. record.instruction .. "\n\n### Response:\n"
end

local ROLES = { human = "user", user = "user", gpt = "assistant", assistant = "assistant", system = "system", bot = "assistant",
                model = "assistant", tool = "tool" }

-- [{role =, content =}] from the two spellings in use.
local function messages_of(list, where)
    local out = {}
    for i, m in ipairs(list) do
        local role, content = ROLES[m.role or m.from or ""], m.content or m.value
        if not role or type(content) ~= "string" then
            lc.fail("%s: message %d needs role (user, assistant, system) and content", where, i)
        end
        out[i] = { role = role, content = content }
    end
    if #out == 0 then lc.fail("%s: a conversation without messages", where) end
    return out
end

-- Kinds of records. Each adds one record to a stream.
local adders = {}

local function encode_prompt(how, text)
    if how.bos == nil then return how.tokenizer:encode(text, { special = true, parse = true }) end
    local ids = how.tokenizer:encode(text, { special = false, parse = true })
    if how.bos and ids[1] ~= how.bos then table.insert(ids, 1, how.bos) end
    return ids
end
local PLAIN = { special = false, parse = true }

local function add_pair(stream, how, prompt, answer)
    stream:add(encode_prompt(how, prompt), false)
    stream:add(how.tokenizer:encode(answer .. how.eos, PLAIN), true)
end

local function text_field(record, name, where)
    local v = record[name]
    if type(v) ~= "string" then lc.fail("%s: the field '%s' is missing or no text", where, name) end
    return v
end

function adders.alpaca(stream, how, record, where)
    text_field(record, "instruction", where)
    add_pair(stream, how, M.alpaca_prompt(record), text_field(record, "output", where))
end

function adders.prompt(stream, how, record, where)
    add_pair(stream, how, text_field(record, "prompt", where),
             text_field(record, record.completion and "completion" or record.response and "response" or "answer", where))
end

function adders.text(stream, how, record, where)
    local ids = encode_prompt(how, text_field(record, "text", where))
    stream:add(ids, true)
    local eos = how.eos ~= "" and how.tokenizer:encode(how.eos, PLAIN) or {}
    if #eos == 1 and ids[#ids] ~= eos[1] then stream:add(eos, true) end
end

-- A conversation by the model's template. What the template writes for an assistant turn, beyond the opening that a prompt would
-- end with, is learned; the white space that follows its end token is not.
function adders.chat(stream, how, record, where)
    local messages = messages_of(record.messages or record.conversations or record, where)
    local upto, done = {}, ""
    local function part(text, learn)
        if text ~= "" then stream:add(how.tokenizer:encode(text, PLAIN), learn) end
    end
    for i, m in ipairs(messages) do
        if m.role == "assistant" then
            local open = how.render(upto, true)
            upto[i] = m
            local closed = how.render(upto, false)
            if open:sub(1, #done) ~= done or closed:sub(1, #open) ~= open then
                lc.fail("%s: the chat template does not write message %d after what stands before it; give the records as text", where, i)
            end
            part(open:sub(#done + 1), false)
            local reply, space = closed:sub(#open + 1):match "^(.-)(%s*)$"
            part(reply, true)
            part(space, false)
            done = closed
        else
            upto[i] = m
        end
    end
end

local function kind_of(record, where)
    if type(record) == "table" and record ~= files.null then
        if record.instruction ~= nil then return "alpaca" end
        if record.messages ~= nil or record.conversations ~= nil then return "chat" end
        if record.prompt ~= nil then return "prompt" end
        if record.text ~= nil then return "text" end
        if type(record[1]) == "table" and (record[1].role or record[1].from) then return "chat" end
    end
    lc.fail("%s: a record has instruction and output (Alpaca), messages (chat), prompt and completion, or text", where)
end

-- ---- sources ------------------------------------------------------------------------------------------------------
-- Lines of a .jsonl file, one record each.
local function read_lines(path, limit)
    local file, why = io.open(path, "rb")
    if not file then lc.fail("%s", why) end
    local records, line_no = {}, 0
    for line in file:lines() do
        line_no = line_no + 1
        if line:find "%S" then records[#records + 1] = files.parse_json(line, ("%s:%d"):format(path, line_no)) end
        if limit and #records >= limit then break end
    end
    file:close()
    return records
end

local function read_records(path, limit)
    if path:match "%.jsonl$" or path:match "%.ndjson$" then return read_lines(path, limit) end
    local list = files.read_json(path)
    if type(list) == "table" and list[1] == nil and type(list.data) == "table" then list = list.data end
    if type(list) ~= "table" or list[1] == nil then lc.fail("%s: an array of records was expected", path) end
    return list
end

local PIECE = 4 * 2 ^ 20

-- A whole text, a few megabytes at a time, cut after a line.
local function add_text(stream, how, text)
    local at = 1
    while at <= #text do
        local stop = #text
        if stop - at + 1 > PIECE then stop = text:find("\n", at + PIECE, true) or #text end
        local piece = text:sub(at, stop)
        stream:add(at == 1 and encode_prompt(how, piece) or how.tokenizer:encode(piece, PLAIN), true)
        at = stop + 1
    end
end

-- ---- lc.data ------------------------------------------------------------------------------------------------------
local KNOWN = { model = true, tokenizer = true, seq = true, hold_out = true, limit = true, format = true, eos = true, bos = true,
                shuffle = true, render = true }

local function bos_id(opts, tok)
    if opts.bos == nil or opts.bos == false then return opts.bos end
    local id = type(opts.bos) == "number" and opts.bos or tok:id(opts.bos)
    if not id then lc.fail("data: the tokenizer has no token '%s' (bos)", tostring(opts.bos)) end
    return id
end

local function resolve(opts)
    local model = opts.model
    local tok = opts.tokenizer or model and model.tokenizer
    if not tok then lc.fail("lc.data needs model = (one with a tokenizer) or tokenizer =") end
    local how = { tokenizer = tok, bos = bos_id(opts, tok), eos = opts.eos or model and model.special and model.special.eos_token,
                  vocabulary = model and model.config and model.config.vocab_size }
    how.render = opts.render or function(messages, generation)
        if not (model and model.chat_template) then
            lc.fail("these records are conversations, and the model has no chat template; give records with text, or a chat model")
        end
        how.template = how.template or require("lolcats.chat_template").compile(model.chat_template)
        local special = model.special or {}
        return how.template:render { messages = messages, add_generation_prompt = generation,
                                     bos_token = special.bos_token or "", eos_token = special.eos_token or "" }
    end
    return how
end

local function add_records(how, records, first, last, format, name)
    local stream = M.stream(how.vocabulary)
    for i = first, last do
        local where = ("%s: record %d"):format(name, i)
        local record = records[i]
        if type(record) == "string" then record = { text = record } end
        local kind = format or kind_of(record, where)
        local add = adders[kind]
        if not add then lc.fail("format '%s': there are alpaca, chat, prompt, text", tostring(kind)) end
        if not how.eos then
            if kind == "alpaca" or kind == "prompt" then
                lc.fail("%s: what ends an answer is not known; give eos = \"</s>\" (the end token's text) or a model", name)
            end
            how.eos = ""
        end
        add(stream, how, record, where)
    end
    return stream
end

local function too_short(name, n, seq, what)
    lc.fail("%s: %s has %d tokens, too few for one row of %d (a row needs one more than its length); take a smaller seq or more text",
            name, what, n, seq)
end

local function finish(stream, seq, name, opts, what)
    local rows = M.pack(stream, seq, { targets = true })
    if rows.before == 0 then too_short(name, stream.n, seq, what) end
    if rows.rows == 0 then lc.fail("%s: no row of %s has a label to learn", name, what) end
    rows.name = name
    if opts.shuffle == false then rows.shuffle = false end
    return rows
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

local function from_records(records, how, opts, name, seq)
    local n = math.min(#records, opts.limit or math.huge)
    if n == 0 then lc.fail("%s: no records", name) end
    local k = held_count(opts.hold_out, n, name)
    local train = finish(add_records(how, records, k + 1, n, opts.format, name), seq, name, opts, "the training part")
    if k > 0 then
        train.held = finish(add_records(how, records, 1, k, opts.format, name), seq, name .. " (held out)", opts, "the held-out part")
    end
    return train
end

-- A text is one stream; what is held out is its end.
local function split_stream(stream, hold_out, seq, name)
    if not hold_out or hold_out == 0 then return nil end
    local want = hold_out < 1 and math.ceil(hold_out * stream.n) or hold_out * seq + 1
    want = math.max(want, seq + 1)
    if stream.n - want <= seq then too_short(name, stream.n, seq, "the text (with a part held out)") end
    local tail = M.stream()
    tail:reserve(want)
    for i = 0, want - 1 do
        tail.p_ids[i], tail.p_labels[i] = stream.p_ids[stream.n - want + i], stream.p_labels[stream.n - want + i]
    end
    tail.n = want
    stream.n = stream.n - want
    return tail
end

local function from_stream(stream, opts, name, seq)
    local tail = split_stream(stream, opts.hold_out, seq, name)
    local train = finish(stream, seq, name, opts, "the text")
    if tail then train.held = finish(tail, seq, name .. " (held out)", opts, "the held-out part") end
    return train
end

-- The one .json or .jsonl file of a Hub data set in the local cache ("owner/name"), or nil.
local function cached_dataset(id)
    if not id:match "^[%w%-%._]+/[%w%-%._]+$" then return nil end
    local root = require("lolcats.hub").hf_cache() .. "/datasets--" .. id:gsub("/", "--") .. "/snapshots"
    for _, commit in ipairs(files.is_folder(root) and files.list(root) or {}) do
        for _, name in ipairs(files.list(root .. "/" .. commit)) do
            if name:match "%.jsonl?$" then return root .. "/" .. commit .. "/" .. name end
        end
    end
    lc.fail("the data set %s is not in the Hugging Face cache (looked in %s); download it, or name a .json, .jsonl or .txt file", id, root)
end

--- Training rows from a file (.json, .jsonl, .txt), "chitchat" (conversations, fetched once with pip), or a table of records or
--- texts. opts: model (its tokenizer, chat template and end token) or tokenizer; seq (tokens a row, 1024); hold_out (a share, or a
--- number of records: the first ones; of a text, the end); limit (records), format, eos, bos (false: none; a token: before each
--- prompt), shuffle (true). Returns rows with .held; rows:batch{i, ...}, rows:order(epoch, seed), rows:list(n).
function M.data(source, opts)
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
    if type(source) == "table" then return from_records(source, resolve(opts), opts, "records", seq) end
    if type(source) ~= "string" then lc.fail("lc.data: a file or a table of records, got a %s", type(source)) end
    if source == "chitchat" then
        local path = require("lolcats.data.chitchat").path()
        return from_records(read_lines(path, opts.limit), resolve(opts), opts, "chitchat", seq)
    end
    source = files.exists(source) and source or cached_dataset(source) or source
    if not files.exists(source) then lc.fail("no data '%s': there is no such file (and the only data set known by name is chitchat)", source) end
    if files.is_folder(source) then lc.fail("%s is a folder; name a .json, .jsonl or .txt file", source) end
    if source:match "%.json$" or source:match "%.jsonl$" or source:match "%.ndjson$" then
        return from_records(read_records(source, opts.limit), resolve(opts), opts, source, seq)
    end
    if source:match "%.parquet$" then lc.fail("%s: parquet files are not read yet; give .json, .jsonl or .txt", source) end
    local how = resolve(opts)
    local text = files.read(source)
    if not text:find "%S" then lc.fail("%s: the text is empty", source) end
    local stream = M.stream(how.vocabulary)
    add_text(stream, how, text)
    return from_stream(stream, opts, source, seq)
end

--- Rows from ids (a table, or an integer tensor of one dim): every token is learned. opts: seq, hold_out, vocabulary, shuffle, name.
function M.from_ids(ids, opts)
    local stream = M.stream(opts.vocabulary)
    if lc.is_tensor(ids) then
        local x = ids:to("i32"):contiguous()
        local buf, n = tensors.to_host(x)
        stream:reserve(n)
        for i = 0, n - 1 do stream.p_ids[i], stream.p_labels[i] = buf[i], buf[i] end
        stream.n = n
    else
        stream:add(ids, true)
    end
    return from_stream(stream, opts, opts.name or "ids", opts.seq or 1024)
end

M.Rows, M.Stream, M.IGNORE = Rows, Stream, IGNORE
M.adders = adders
M.resolve = resolve
return M
