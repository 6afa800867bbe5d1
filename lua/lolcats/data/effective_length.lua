-- effective_length.lua: the effective sequence length of training rows (how far back a softmax model really looks),
-- rankings by it, and the .npy files in which rankings are kept. For a query i with weights a_ij it is the sum over j
-- of (i - j) a_ij; a row's score is the mean over layers, heads and queries.
local lc = require "lolcats"
local files = require "lolcats.files"
local attention = require "lolcats.attention"
local bit = require "bit"

local M = {}

--- The score of ids (one row) under a model's softmax attention. queries: only the last so many. The positions j stand
--- as values, so the op itself sums j a_ij: memory is linear in the length.
function M.score(model, ids, queries)
    return lc.no_grad(lc.scope, function()
        ids = model:check_ids(ids)
        local t = ids:size(2)
        local first = math.max(1, t - (queries or t) + 1)
        local ctx = model:context(ids, {})
        local x = lc.embedding(model.embed, ids)
        if x.dtype ~= model.dtype then x = x:to(model.dtype) end
        local total = 0
        for _, layer in ipairs(model.layers) do
            x = lc.scope(function()
                local normed = model:norm_in(layer, x)
                local q, k, v = model:qkv(layer, normed, ctx)
                local call = { start = ctx.start, pos = ctx.pos, layer = layer.index, hidden = normed,
                               window = layer.window, seen = 0 }
                local fine = model.fine
                -- seen from the row's middle, to lose fewer digits
                local at = lc.arange(0, t, 1, { dtype = fine, device = model.device })
                at = at - (t - 1) / 2
                local places = at:reshape(1, 1, t, 1):expand(1, k:size(2), t, v:size(-1)):clone()
                local y = attention.softmax(q:to(fine), k:to(fine), places, call)
                local seen = y:slice(-1, 1, 1):reshape(-1, t):slice(2, first, t)
                total = total + (at:slice(1, first, t):reshape(1, -1) - seen):mean():item()
                return model:finish(layer, x, attention.softmax(q, k, v, call), ctx)
            end)
        end
        return total / #model.layers
    end)
end

--- Indices of rows (from 0) by falling score, and the scores. limit: rows that are looked at.
function M.rank(model, rows, opts)
    opts = opts or {}
    local n, scores, order = math.min(rows.rows, opts.limit or rows.rows), {}, {}
    for i = 1, n do
        scores[i] = lc.scope(function() return M.score(model, rows:row(i).ids, opts.queries) end)
        order[i] = i - 1
        if opts.progress then opts.progress(i, n) end
    end
    table.sort(order, function(a, b)
        if scores[a + 1] ~= scores[b + 1] then return scores[a + 1] > scores[b + 1] end
        return a < b
    end)
    return order, scores
end

--- The file name of a ranking, as the reference writes it. config: a dataset_config.
function M.file_name(config, window)
    local data = {}
    for i, s in ipairs(config.train_data) do
        data[i] = (s:gsub("/", "_"):gsub("%.json", ""):gsub("%[", "_"):gsub("%]", ""))
    end
    return ("d=%s-mts=%d-dcs=%d-max=%d-min=%d-s=%d%s.npy"):format(table.concat(data, "-d="), config.max_train_samples,
            config.chunk_size,
        config.max_length, config.min_length, config.seed, window and window > 0 and ("_l%03d"):format(window) or "")
end

-- ---- .npy -----------------------------------------------------------------------------------------------------------
local function little(s, at, n)
    local v = 0
    for i = n, 1, -1 do v = v * 256 + s:byte(at + i - 1) end
    return v
end

--- Whole numbers of a one-dimensional int32 or int64 .npy file.
function M.read_npy(path)
    local s = files.read(path)
    if s:sub(1, 6) ~= "\147NUMPY" or #s < 10 then lc.fail("%s is no .npy file", path) end
    local wide = s:byte(7) >= 2
    local size = #s >= 12 and little(s, 9, wide and 4 or 2) or 0
    local begin = (wide and 12 or 10) + size
    local head = s:sub(1, begin)
    local bytes, n = tonumber(head:match "'descr':%s*'<i([48])'"), tonumber(head:match "'shape':%s*%((%d+),%s*%)")
    if not bytes or not n then lc.fail("%s: a one-dimensional array of int32 or int64 was expected", path) end
    if #s ~= begin + bytes * n then
        lc.fail("%s: %d numbers were expected; the file has %d bytes for them", path, n, #s - begin)
    end
    local out = {}
    for i = 1, n do
        local at = begin + (i - 1) * bytes + 1
        local v = little(s, at, 4)
        if v >= 2 ^ 31 or (bytes == 8 and little(s, at + 4, 4) ~= 0) then
            lc.fail("%s: entry %d is not an index", path, i - 1)
        end
        out[i] = v
    end
    return out
end

--- Writes indices as int64.
function M.write_npy(path, list)
    local head = ("{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }"):format(#list)
    head = head .. (" "):rep(63 - (10 + #head) % 64) .. "\n"
    local parts = { "\147NUMPY\1\0", string.char(#head % 256, math.floor(#head / 256)), head }
    for i, v in ipairs(list) do
        parts[i + 3] = string.char(bit.band(v, 255), bit.band(bit.rshift(v, 8), 255), bit.band(bit.rshift(v, 16), 255),
                                   bit.rshift(v, 24), 0, 0, 0, 0)
    end
    files.write(path, table.concat(parts))
end

return M
