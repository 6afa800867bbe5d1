-- blockwise/streams.lua: the hidden states that reach each block, row by row: written to disk once a block ("disk"),
-- held in memory ("memory"), or computed again from the tokens through the blocks before ("recompute"), a shard of rows
-- at a time. All three hand out the same rows in the same order: shards in turn, their rows shuffled.
local lc = require "lolcats"
local files = require "lolcats.files"
local data_module = require "lolcats.data"

local M = {}

M.KINDS = { disk = true, memory = true, recompute = true }

local Streams = {}
Streams.__index = Streams

--- Hidden states of ids [b, t] before the first layer, in the model's dtype.
function M.embed(model, ids)
    ids = model:check_ids(ids)
    local x = lc.embedding(model.embed, ids)
    return x.dtype ~= model.dtype and x:to(model.dtype) or x
end

function M.new(owner)
    local o = owner.opts
    local self = setmetatable({ owner = owner, kind = o.inputs or "disk", shard = o.shard or 16, data = o.data,
                                n = o.data.rows, n_held = 0, memory = {} }, Streams)
    if o.data.held then self.n_held = math.min(o.eval_rows or 8, o.data.held.rows) end
    self.shards = math.ceil(self.n / self.shard)
    return self
end

-- Row numbers of a shard; shard 0 are the held-out rows that are looked at.
local function members(self, s)
    local out = {}
    if s == 0 then
        for i = 1, self.n_held do out[i] = i end
        return out
    end
    for i = (s - 1) * self.shard + 1, math.min(self.n, s * self.shard) do out[#out + 1] = i end
    return out
end

local function ids_of(self, s, i)
    return (s == 0 and self.data.held or self.data):row(i).ids
end

local function folder(self, b)
    return ("%s/b%02d"):format(self.owner.opts.hidden or self.owner.out .. "/hidden", b)
end

local function path(self, b, s) return ("%s/%05d.safetensors"):format(folder(self, b), s) end

local function name_of(i) return ("row%07d"):format(i) end

local function write_shard(self, b, s, rows)
    files.make_dirs(folder(self, b))
    local tensors = {}
    for i, x in pairs(rows) do tensors[name_of(i)] = x end
    files.save_tensors(path(self, b, s), tensors, { format = "lolcats-hidden" })
end

-- ---- making them ----------------------------------------------------------------------------------------------------
local function embed_shard(self, model, s)
    local rows = {}
    for _, i in ipairs(members(self, s)) do rows[i] = lc.no_grad(lc.scope, M.embed, model, ids_of(self, s, i)) end
    return rows
end

local function push(rows, model)
    local through = require("lolcats.blockwise").through
    lc.no_grad(function()
        for i, x in pairs(rows) do
            rows[i] = lc.scope(through, model, x)
            x:drop()
        end
    end)
    return rows
end

-- A shard's inputs of block b from the tokens on, one block in memory after the other.
local function recompute(self, b, s)
    local blockwise, owner = require "lolcats.blockwise", self.owner
    local top = owner:part(1, 0, { embed = true })
    local rows = embed_shard(self, top, s)
    blockwise.drop_model(top)
    for at = 1, b - 1 do
        local model = owner:part(owner.blocks[at].first, owner.blocks[at].last)
        push(rows, model)
        blockwise.drop_model(model)
    end
    return rows
end

local read_shard

local function have(self, b, s)
    if self.kind == "disk" then return files.exists(path(self, b, s)) end
    return self.memory.block == b and self.memory[s] ~= nil
end

local function put(self, b, s, rows)
    if self.kind == "disk" then
        lc.scope(write_shard, self, b, s, rows)
        for _, x in pairs(rows) do x:drop() end
        return
    end
    if self.memory.block ~= b then
        self.memory = { block = b }
    end
    for _, x in pairs(rows) do lc.keep(x) end
    self.memory[s] = rows
end

--- Sees to it that the inputs of block b can be had. After a restart they may have to be made from the last ones that
--- are there, or from the tokens.
function Streams:prepare(b)
    if self.kind == "recompute" then return end
    local first, owner, model = self.n_held > 0 and 0 or 1, self.owner, nil
    for s = first, self.shards do -- a run that was killed between two blocks: the last ones are still there
        if self.kind == "disk" and b > 1 and not have(self, b, s) and have(self, b - 1, s) then
            model = model or owner:part(owner.blocks[b - 1].first, owner.blocks[b - 1].last)
            lc.scope(function() put(self, b, s, push(read_shard(self, b - 1, s), model)) end)
        end
    end
    if model then require("lolcats.blockwise").drop_model(model) end
    for s = first, self.shards do
        if not have(self, b, s) then lc.scope(function() put(self, b, s, recompute(self, b, s)) end) end
    end
end

-- Rows of a shard: number -> tensor.
function read_shard(self, b, s)
    if self.kind == "recompute" then return lc.scope(recompute, self, b, s) end
    if self.kind == "memory" then return self.memory[s] end
    local f, rows = files.open_tensors(path(self, b, s)), {}
    local device = self.owner.opts.device
    for _, i in ipairs(members(self, s)) do
        local x = f:tensor(name_of(i))
        rows[i] = device and x.device ~= device and x:to { device = device } or x
    end
    f:close()
    return rows
end

--- After block b is learned: its outputs become the next block's inputs, and its inputs go.
function Streams:advance(b, teacher)
    local next_b = b + 1
    if self.kind ~= "recompute" and next_b <= #self.owner.blocks then
        local old = self.memory
        for s = self.n_held > 0 and 0 or 1, self.shards do
            if self.kind == "memory" or not have(self, next_b, s) then
                lc.scope(function()
                    put(self, next_b, s, push(self.kind == "memory" and old[s] or read_shard(self, b, s), teacher))
                end)
            end
        end
    end
    if self.kind == "disk" and not self.owner.opts.keep_inputs then
        for s = 0, self.shards do
            if files.exists(path(self, b, s)) then files.remove(path(self, b, s)) end
        end
    end
    self:release()
end

-- ---- handing them out -----------------------------------------------------------------------------------------------
function Streams:release()
    if self.current and self.kind ~= "memory" then
        for _, x in pairs(self.current.rows) do x:drop() end
    end
    self.current = nil
end

local function current(self, b, s)
    local c = self.current
    if not c or c.b ~= b or c.s ~= s then
        self:release()
        local rows = read_shard(self, b, s)
        for _, x in pairs(rows) do lc.keep(x) end
        c = { b = b, s = s, rows = rows }
        self.current = c
    end
    return c.rows
end

--- Hidden states of the held-out rows before block b, as a list.
function Streams:held(b)
    if self.n_held == 0 then
        lc.fail("the data has nothing held out; a block's training is watched on held-out rows")
    end
    local rows, out = read_shard(self, b, 0), {}
    for i = 1, self.n_held do out[i] = lc.keep(rows[i]) end
    return out
end

local Rows = {}
Rows.__index = Rows

--- Training rows of block b for lc.run: batch.hidden is [rows, t, H].
function Streams:rows(b)
    return setmetatable({ streams = self, b = b, rows = self.n, seq = self.data.seq }, Rows)
end

function Rows:batch(list)
    local xs, ids = {}, {}
    for i, r in ipairs(list) do
        xs[i] = current(self.streams, self.b, math.ceil(r / self.streams.shard))[r]
        ids[i] = ids_of(self.streams, math.ceil(r / self.streams.shard), r)
    end
    local function joined(ts) return #ts == 1 and ts[1]:alias() or lc.cat(ts, 1) end
    return { hidden = joined(xs), ids = joined(ids), index = list }
end

--- Shards in shuffled turn, their rows shuffled: a shard is read once an epoch.
function Rows:order(epoch, seed)
    local st, out = self.streams, {}
    for _, s in ipairs(data_module.order(st.shards, epoch, seed)) do
        local list = members(st, s)
        for _, at in ipairs(data_module.order(#list, epoch * 7919 + s, seed)) do out[#out + 1] = list[at] end
    end
    return out
end

function Rows:describe()
    local d = self.streams.data
    return { rows = self.rows, shard = self.streams.shard, of = d.describe and d:describe() or nil }
end

return M
