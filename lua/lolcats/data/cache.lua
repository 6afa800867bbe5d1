-- cache.lua: tokens of a source kept in a file, so that it is read and tokenized once and need not fit into the memory. A cache is
-- named by a hash of all that it depends on: the source's bytes, the tokenizer, the format, the template, what ends an answer.
local lc = require "lolcats"
local files = require "lolcats.files"
local http = require "lolcats.core.http"
local log = require "lolcats.log"
local streams = require "lolcats.data.stream"

local M = {}

M.least = 32 * 2 ^ 20 -- sources of so many bytes are kept without being asked

local PROBE = "The quick (brown) fox\n\tjumps 12,345.67 over  it's «naïve» 東京 🙂 end."

-- What tells one tokenizer from another: each of its tokens, and what it does with a text.
local function fingerprint(tokenizer)
    local parts = { table.concat(tokenizer:encode(PROBE), " ") }
    if tokenizer.token then
        for id = 0, tokenizer.size - 1 do
            parts[#parts + 1] = (tokenizer:token(id) or "\1") .. (tokenizer:is_special(id) and "\2" or "")
        end
    end
    return files.sha256(table.concat(parts, "\0"))
end

local function size_of(path)
    local f = io.open(path, "rb")
    if not f then return 0 end
    local n = f:seek "end"
    f:close()
    return n
end

function M.bytes(paths)
    local sum = 0
    for _, path in ipairs(paths) do sum = sum + size_of(path) end
    return sum
end

-- The hash of a file. A blob of the Hub's cache has it as its name; of others it is remembered by path, size and time in a table.
local hashes = {}
local function hash_of(path)
    if not hashes[path] then hashes[path] = http.sha256_file(path) end
    return hashes[path]
end

--- Where the tokens of these files, made this way, are kept: a path without ending. named: a name that stands for a format that
--- is a function.
function M.path(paths, how, opts, named)
    local key = { version = 1, tokenizer = fingerprint(how.tokenizer), eos = how.eos or files.null, bos = how.bos == nil and files.null or how.bos,
                  vocabulary = how.vocabulary or files.null, template = how.template_text or files.null,
                  format = named or opts.format or files.null, limit = opts.limit or files.null, learn = opts.learn or "answers" }
    local parts = { files.to_json(key) }
    for _, path in ipairs(paths) do parts[#parts + 1] = hash_of(path) end
    local dir = require("lolcats.hub").cache_dir() .. "/tokens"
    files.make_dirs(dir)
    return dir .. "/" .. files.sha256(table.concat(parts, "\n")):sub(1, 40)
end

-- Waits while another process makes the same cache.
local function lock(path)
    local said
    while true do
        local ok, held = pcall(files.lock, path .. ".lock")
        if ok then return held end
        if not tostring(held):find("another process holds it", 1, true) then error(held, 0) end
        if not said then log.say("waiting for another process that tokenizes the same data") end
        said = true
        local stop = lc.now() + 0.5
        while lc.now() < stop do
            if lc.interrupted() then lc.fail("interrupted") end
            os.execute "sleep 0.1"
        end
    end
end

--- The tokens kept at a path; made by fill(store) when they are not there yet.
function M.get(path, vocabulary, about, fill)
    local store = streams.open_store(path)
    if store then return store, true end
    local held = lock(path)
    store = streams.open_store(path)
    if store then
        held.unlock()
        return store, true
    end
    local making = streams.new_store(path, vocabulary)
    local ok, result = pcall(function()
        fill(making)
        return making:commit(about)
    end)
    if not ok then making:abandon() end
    held.unlock()
    if not ok then error(result, 0) end
    return result, false
end

return M
