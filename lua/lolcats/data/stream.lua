-- stream.lua: tokens one after another with what of them is learned, in memory (two int32 tensors) or in a file; where records
-- end; and rows of them: packed to one length by the reference's rule, or one record each. A row in memory is a view of its stream.
local lc = require "lolcats"
local files = require "lolcats.files"
local bit = require "bit"
local numbers = require "lolcats.core.records"

local M = {}

local IGNORE = -100
M.IGNORE = IGNORE

local function buffer(n, dtype) return lc.keep(lc.empty({ n }, { dtype = dtype or "i32", device = "cpu" })) end

local function check_id(id, top)
    if id < 0 or id >= top then
        lc.fail("token id %d is outside the model's vocabulary (0 to %d): tokenizer and model do not belong together", id, top - 1)
    end
end

-- ---- a growing list of numbers: where records end -----------------------------------------------------------------
local Marks = {}
Marks.__index = Marks

local function marks()
    local self = setmetatable({ n = 0, room = 4096, cells = buffer(4096, "f64") }, Marks)
    self.p = self.cells:data()
    return self
end

function Marks:push(v)
    if self.n == self.room then
        local old = self.cells
        self.room = 2 * self.room
        self.cells = buffer(self.room, "f64")
        lc.no_grad(lc.scope, function() self.cells:narrow(1, 1, self.n):copy_(old:narrow(1, 1, self.n)) end)
        self.p = self.cells:data()
        old:drop()
    end
    self.p[self.n] = v
    self.n = self.n + 1
end

-- ---- in memory ----------------------------------------------------------------------------------------------------
local Stream = {}
Stream.__index = Stream
M.Stream = Stream

function M.stream(vocabulary)
    local self = setmetatable({ n = 0, room = 65536, answers = 0, vocabulary = vocabulary or math.huge, marks = marks() }, Stream)
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
        check_id(id, top)
        p[at + i - 1] = id
        l[at + i - 1] = learn and id or IGNORE
    end
    self.n = at + n
    if learn then self.answers = self.answers + n end
end

--- A record ends here.
function Stream:mark() self.marks:push(self.n) end
--- Where record i (from 1) begins; record count + 1 begins at the end.
function Stream:record_start(i) return i == 1 and 0 or self.marks.p[i - 2] end
function Stream:records() return self.marks.n end

--- n tokens from position `at` (from 0): ids and labels, views.
function Stream:view(at, n) return self.ids:narrow(1, at + 1, n), self.labels:narrow(1, at + 1, n) end

--- How many of them are learned.
function Stream:learned(at, n)
    local l, count = self.p_labels, 0
    for i = at, at + n - 1 do
        if l[i] ~= IGNORE then count = count + 1 end
    end
    return count
end

-- ---- in a file ----------------------------------------------------------------------------------------------------
-- PATH.ids: int32, a token that is not learned as -1 - id. PATH.ends: float64, where records end. PATH.json: counts, written last.
local Store = {}
Store.__index = Store
M.Store = Store

local PIECE, WINDOW = 2 ^ 20, 2 ^ 22

--- A store in the making at a path without ending.
function M.new_store(path, vocabulary)
    local self = setmetatable({ path = path, n = 0, held = 0, answers = 0, vocabulary = vocabulary or math.huge, marks = 0,
                                piece = buffer(PIECE), ends = buffer(PIECE / 8, "f64"), n_ends = 0 }, Store)
    self.p, self.p_ends = self.piece:data(), self.ends:data()
    self.ids_file, self.ends_file = numbers.writer(path .. ".ids.part"), numbers.writer(path .. ".ends.part")
    return self
end

local function flush_ids(self)
    if self.held > 0 then self.ids_file:write(self.piece, self.held) end
    self.held = 0
end

local function flush_ends(self)
    if self.n_ends > 0 then self.ends_file:write(self.ends, self.n_ends) end
    self.n_ends = 0
end

function Store:add(ids, learn)
    local p, top, held, sign = self.p, self.vocabulary, self.held, learn and 1 or -1
    local shift = learn and 0 or -1
    for i = 1, #ids do
        local id = ids[i]
        check_id(id, top)
        if held == PIECE then
            self.held = held
            flush_ids(self)
            held = 0
        end
        p[held] = sign * id + shift
        held = held + 1
    end
    self.held, self.n = held, self.n + #ids
    if learn then self.answers = self.answers + #ids end
end

function Store:mark()
    if self.n_ends == PIECE / 8 then flush_ends(self) end
    self.p_ends[self.n_ends] = self.n
    self.n_ends, self.marks = self.n_ends + 1, self.marks + 1
end

--- Gives up a store in the making.
function Store:abandon()
    pcall(self.ids_file.close, self.ids_file)
    pcall(self.ends_file.close, self.ends_file)
    os.remove(self.path .. ".ids.part")
    os.remove(self.path .. ".ends.part")
end

--- Ends the making; about: what is written beside the counts.
function Store:commit(about)
    flush_ids(self)
    flush_ends(self)
    self.ids_file:close()
    self.ends_file:close()
    self.piece:drop()
    self.ends:drop()
    files.rename(self.path .. ".ids.part", self.path .. ".ids")
    files.rename(self.path .. ".ends.part", self.path .. ".ends")
    files.write_json(self.path .. ".json", { version = 1, tokens = self.n, records = self.marks, answers = self.answers, about = about })
    return M.open_store(self.path)
end

local function size_of(path)
    local f = io.open(path, "rb")
    if not f then return -1 end
    local n = f:seek "end"
    f:close()
    return n
end

--- A store that is whole, or nil.
function M.open_store(path)
    if not files.is_file(path .. ".json") then return nil end
    local ok, about = pcall(files.read_json, path .. ".json")
    if not ok or type(about) ~= "table" or about.version ~= 1 then return nil end
    if size_of(path .. ".ids") ~= about.tokens * 4 or size_of(path .. ".ends") ~= about.records * 8 then return nil end
    return setmetatable({ path = path, n = about.tokens, marks = about.records, answers = about.answers, about = about.about }, Store)
end

function Store:records() return self.marks end
function Store:record_start(i)
    if i == 1 then return 0 end
    local block = math.floor((i - 2) / 4096)
    if self.block ~= block then -- records are asked for one after another
        local first = block * 4096
        self.starts = lc.scope(function()
            return numbers.map(self.path .. ".ends", first * 8, "f64", math.min(4096, self.marks - first)):totable()
        end)
        self.block = block
    end
    return self.starts[i - 1 - block * 4096]
end

-- f(p, n, at) over the stored numbers of a part.
local function each_window(self, at, n, f)
    local stop = at + n
    while at < stop do
        local now = math.min(WINDOW, stop - at)
        lc.scope(function()
            local x = numbers.map(self.path .. ".ids", at * 4, "i32", now)
            f(x:data(), now, at)
        end)
        at = at + now
    end
end

function Store:view(at, n)
    local ids, labels = lc.empty({ n }, { dtype = "i32", device = "cpu" }), lc.empty({ n }, { dtype = "i32", device = "cpu" })
    local a, b, first = ids:data(), labels:data(), at
    each_window(self, at, n, function(p, now, from)
        local to = from - first
        for i = 0, now - 1 do
            local v = p[i]
            a[to + i] = v >= 0 and v or -1 - v
            b[to + i] = v >= 0 and v or IGNORE
        end
    end)
    return ids, labels
end

function Store:learned(at, n)
    if self.answers == self.n then return n end
    local count = 0
    each_window(self, at, n, function(p, now)
        for i = 0, now - 1 do
            if p[i] >= 0 then count = count + 1 end
        end
    end)
    return count
end

-- ---- rows ---------------------------------------------------------------------------------------------------------
local Rows = {}
Rows.__index = Rows
M.Rows = Rows

-- Of a part of a store: where rows with labels begin, and how many labels; one pass over the file.
local function scan_store(store, from, before, size, first)
    if store.answers == store.n then -- all is learned: no row is left out, and no list of them is needed
        return setmetatable({}, { __index = function(_, i) return from + (i - 1) * size end }), before * (size - first), before
    end
    local starts, targets, count, row = {}, 0, 0, 0
    each_window(store, from, before * size, function(p, now, at)
        local place = (at - from) % size
        for i = 0, now - 1 do
            if place >= first and p[i] >= 0 then count = count + 1 end
            place = place + 1
            if place == size then
                if count > 0 then starts[#starts + 1] = from + row * size end
                targets, count, place, row = targets + count, 0, 0, row + 1
            end
        end
    end)
    return starts, targets, #starts
end

local function scan_memory(stream, from, before, size, first)
    local starts, targets = {}, 0
    for r = 0, before - 1 do
        local count = stream:learned(from + r * size + first, size - first)
        if count > 0 then starts[#starts + 1] = from + r * size end
        targets = targets + count
    end
    return starts, targets, #starts
end

--- Rows of `size` tokens of a stream: a row leaves while strictly more than its length is there, the rest is dropped, and so are
--- rows without a label. opts.targets: also rows whose only label is their first token, which nothing predicts; opts.from, opts.upto:
--- of this part (positions from 0, the end excluded).
function M.pack(stream, size, opts)
    local from, upto = opts and opts.from or 0, opts and opts.upto or stream.n
    local before = math.max(0, math.floor((upto - from - 1) / size))
    local first = opts and opts.targets and 1 or 0
    local starts, targets, n = (stream.path and scan_store or scan_memory)(stream, from, before, size, first)
    return setmetatable({
        stream = stream, seq = size, starts = starts, rows = n, before = before, left = upto - from - before * size,
        tokens = n * size, targets = targets, from = from, upto = upto,
    }, Rows)
end

-- Where row i is: position and length.
function Rows:place(i)
    if type(i) ~= "number" or i < 1 or i > self.rows then lc.fail("row %s: there are %d rows", tostring(i), self.rows) end
    return self.starts[i], self.lengths and self.lengths[i] or self.seq
end

--- Row i (from 1) as {ids = [1, seq], labels = [1, seq]}.
function Rows:row(i)
    local at, n = self:place(i)
    local ids, labels = self.stream:view(at, n)
    return { ids = ids:reshape(1, n), labels = labels:reshape(1, n), index = i }
end

-- Rows of different lengths: filled up on the right, where a causal model does not look, with labels of -100.
local function padded(self, list, longest)
    local ids = lc.full({ #list, longest }, self.pad or 0, { dtype = "i32", device = "cpu" })
    local labels = lc.full({ #list, longest }, IGNORE, { dtype = "i32", device = "cpu" })
    local lengths = {}
    for k, i in ipairs(list) do
        local row = self:row(i)
        local n = row.ids:size(2)
        lengths[k] = n
        ids:narrow(1, k, 1):narrow(2, 1, n):copy_(row.ids)
        labels:narrow(1, k, 1):narrow(2, 1, n):copy_(row.labels)
    end
    return { ids = ids, labels = labels, index = list[1], lengths = lengths }
end

--- Several rows as one batch: ids and labels [n, seq]; of rows that are not packed [n, longest], and lengths.
function Rows:batch(list)
    if #list == 1 then return self:row(list[1]) end
    if self.lengths then
        local longest = 0
        for _, i in ipairs(list) do longest = math.max(longest, (select(2, self:place(i)))) end
        return lc.no_grad(padded, self, list, longest)
    end
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

--- Records `first` to `last` of a stream as one row each, cut to `size` tokens; those without a label that is predicted are left out.
function M.unpacked(stream, size, first, last, pad)
    local starts, lengths, tokens, targets, longest = {}, {}, 0, 0, 0
    local at = stream:record_start(first)
    for i = first, last do
        local stop = stream:record_start(i + 1)
        local n = math.min(size, stop - at)
        local learned = n > 1 and stream:learned(at + 1, n - 1) or 0
        if learned > 0 then
            starts[#starts + 1], lengths[#lengths + 1] = at, n
            tokens, targets, longest = tokens + n, targets + learned, math.max(longest, n)
        end
        at = stop
    end
    return setmetatable({ stream = stream, seq = longest, starts = starts, lengths = lengths, rows = #starts, before = last - first + 1,
                          left = 0, tokens = tokens, targets = targets, pad = pad }, Rows)
end

--- sha256 over the rows' ids and over their labels, as little-endian int32.
function Rows:digest()
    if self.hash then return self.hash[1], self.hash[2] end
    local ids, labels = buffer(math.max(1, self.tokens)), buffer(math.max(1, self.tokens))
    local to = 1
    lc.no_grad(function()
        for i = 1, self.rows do
            lc.scope(function()
                local row = self:row(i)
                local n = row.ids:size(2)
                ids:narrow(1, to, n):copy_(row.ids:reshape(n))
                labels:narrow(1, to, n):copy_(row.labels:reshape(n))
                to = to + n
            end)
        end
    end)
    self.hash = self.tokens == 0 and { files.sha256 "", files.sha256 "" } or { files.sha256(ids), files.sha256(labels) }
    ids:drop()
    labels:drop()
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

--- What the rows are, for comparing runs. Of rows in a file: the hash of what names the file and its part.
function Rows:describe()
    local hash = self.stream.path
        and files.sha256(("%s %.0f %.0f %d %d"):format(files.basename(self.stream.path), self.starts[1] or 0, self.tokens, self.rows, self.seq))
        or (self:digest())
    return { source = self.name, rows = self.rows, seq = self.seq, ids_sha256 = hash }
end

function Rows:__tostring()
    return ("%s: %d rows of %s%d tokens, %d of them learned%s"):format(self.name or "rows", self.rows, self.lengths and "at most " or "",
        self.seq, self.targets, self.held and ("; %d rows held out"):format(self.held.rows) or "")
end

return M
