-- source.lua: where records come from: a file or a folder of files (.parquet, .jsonl, .json, .csv, .tsv, .txt, packed with gzip or
-- Zstandard or not), a data set of a Hub by name with config and split, conversations of a package on PyPI, or a Lua table.
-- Records are pulled one at a time: a file larger than the memory is no matter.
local lc = require "lolcats"
local files = require "lolcats.files"
local records = require "lolcats.core.records"

local M = {}

local ENDINGS = { parquet = "parquet", jsonl = "jsonl", ndjson = "jsonl", json = "json", csv = "csv", tsv = "tsv", txt = "text" }
local BEST_FIRST = { "parquet", "jsonl", "json", "csv", "tsv", "text" }
local KINDS = ".parquet, .jsonl, .json, .csv, .tsv or .txt (also .gz, .zst)"

--- "parquet", "jsonl", "json", "csv", "tsv" or "text" by a file's name, or nil.
function M.format_of(name)
    name = name:lower():gsub("%.gz$", ""):gsub("%.zst$", "")
    return ENDINGS[name:match "%.(%w+)$" or ""]
end

-- ---- data sets: which files are which split -----------------------------------------------------------------------
-- A path pattern of a data set's card (*, **, ?, [..], {a,b}) as Lua patterns.
local function globs(text, out)
    out = out or {}
    local before, choice, after = text:match "^(.-){([^{}]*)}(.*)$"
    if choice then
        for option in (choice .. ","):gmatch "([^,]*)," do globs(before .. option .. after, out) end
        return out
    end
    local p = text:gsub("^%./", ""):gsub("[%^%$%(%)%%%.%+%-]", "%%%0"):gsub("%*%*/?", "\1"):gsub("%*", "[^/]*"):gsub("%?", "[^/]")
                  :gsub("%[!", "[^"):gsub("\1", ".*")
    out[#out + 1] = "^" .. p .. "$"
    return out
end

local function as_list(v)
    if type(v) ~= "table" then return { v } end
    return v
end

local function matching(names, patterns, folder)
    local out, seen = {}, {}
    for _, text in ipairs(as_list(patterns)) do
        for _, p in ipairs(globs((folder and folder ~= "" and folder .. "/" or "") .. tostring(text))) do
            for _, name in ipairs(names) do
                if not seen[name] and name:match(p) then out[#out + 1], seen[name] = name, true end
            end
        end
    end
    return out
end

-- The configurations that a data set's card describes: a list of {config_name, data_files, data_dir}, or nil.
local function card_of(path)
    if not path or not files.is_file(path) then return nil end
    local text = files.read(path):gsub("\r\n", "\n"):match "^%-%-%-\n(.-)\n%-%-%-"
    local fine, card = pcall(files.parse_yaml, text or "", path) -- what people write there is not always YAML
    card = fine and card
    local configs = type(card) == "table" and card.configs
    return type(configs) == "table" and configs[1] and configs or nil
end

local WORDS = { { "train", "train", "training" }, { "test", "test", "testing", "eval", "evaluation" },
                { "validation", "validation", "valid", "dev", "val" } }

-- The split that a path names as a word of its own, by the Hub's habit.
local function split_of(name)
    local lower = "/" .. name:lower() .. "/"
    for _, words in ipairs(WORDS) do
        for i = 2, #words do
            if lower:find("[/_%-%. %d]" .. words[i] .. "[/_%-%. %d]") then return words[1] end
        end
    end
end

local function names_of(t)
    local out = {}
    for k in pairs(t) do out[#out + 1] = k end
    table.sort(out)
    return table.concat(out, ", ")
end

-- {split = {names}} by the card.
local function splits_by_card(configs, names, config, where)
    local chosen, known = nil, {}
    for _, c in ipairs(configs) do
        known[tostring(c.config_name)] = true
        if config and c.config_name == config or not config and (c.default == true or c.config_name == "default") then chosen = c end
    end
    if not chosen and not config and #configs == 1 then chosen = configs[1] end
    if not chosen then
        lc.fail("%s: %s; it has %s", where, config and ("there is no config '%s'"):format(config) or "which config? Give config = \"...\"", names_of(known))
    end
    local out = {}
    local data_files = chosen.data_files
    if data_files == nil or data_files == files.null then
        local dir = chosen.data_dir and chosen.data_dir .. "/" or ""
        for _, name in ipairs(names) do
            if name:sub(1, #dir) == dir and M.format_of(name) then
                local split = split_of(name:sub(#dir + 1)) or "train"
                out[split] = out[split] or {}
                table.insert(out[split], name)
            end
        end
        return out
    end
    if type(data_files) ~= "table" or type(data_files[1]) ~= "table" then data_files = { { split = "train", path = data_files } } end
    for _, entry in ipairs(data_files) do
        out[tostring(entry.split)] = matching(names, entry.path, type(chosen.data_dir) == "string" and chosen.data_dir or nil)
    end
    return out
end

local function splits_by_name(names, config)
    local out, any = {}, false
    for _, name in ipairs(names) do
        local inside = not config or name:find("/" .. config .. "/", 1, true) or name:sub(1, #config + 1) == config .. "/"
        if M.format_of(name) and inside and not name:match "dataset_infos?%.json" and not name:match "^%." then
            local split = split_of(name)
            any = any or split ~= nil
            out[#out + 1] = { name, split or "train" }
        end
    end
    local splits = {}
    for _, entry in ipairs(out) do
        splits[entry[2]] = splits[entry[2]] or {}
        table.insert(splits[entry[2]], entry[1])
    end
    return splits
end

-- Files of one format, the one that most are of.
local function of_one_format(names)
    local count, best = {}, nil
    for _, name in ipairs(names) do
        local f = M.format_of(name)
        if f then count[f] = (count[f] or 0) + 1 end
    end
    for _, f in ipairs(BEST_FIRST) do
        if count[f] and (not best or count[f] > count[best]) then best = f end
    end
    local out = {}
    for _, name in ipairs(names) do
        if M.format_of(name) == best and best then out[#out + 1] = name end
    end
    table.sort(out)
    return out
end

--- Of the names of a data set's files: those of one config and split. card: the path of its README.md, or nil.
function M.choose(names, card, opts, where)
    local configs = card_of(card)
    local splits = configs and splits_by_card(configs, names, opts.config, where) or splits_by_name(names, opts.config)
    local split = opts.split or splits.train and "train" or next(splits)
    if not split then
        lc.fail("%s: it has no file of records%s (%s)", where, opts.config and (" in '%s'"):format(opts.config) or "", KINDS ..
                "; a data set that is a program may have its files at revision = \"refs/convert/parquet\"")
    end
    if not opts.split and not splits.train and next(splits, split) then lc.fail("%s: which split? Give split = one of %s", where, names_of(splits)) end
    if not splits[split] then lc.fail("%s: there is no split '%s'; it has %s", where, split, names_of(splits)) end
    local chosen = of_one_format(splits[split])
    if #chosen == 0 then lc.fail("%s: the split '%s' has no file of records (%s)", where, split, KINDS) end
    return chosen
end

-- How many records a file has, counted up to `most`.
local function count_of(path, most)
    local reader = records.open(path)
    local n = reader:count()
    if not n then
        n = 0
        while n < most and reader:next() ~= nil do n = n + 1 end
    end
    reader:close()
    return n
end

-- ---- finding ------------------------------------------------------------------------------------------------------
local function from_hub(id, opts)
    local hub = require "lolcats.hub"
    local how = { type = "dataset", revision = opts.revision, offline = opts.offline, quiet = opts.quiet }
    local all
    local card = hub.files(id, function(names)
        all = names
        for _, name in ipairs(names) do if name == "README.md" then return { name } end end
        return {}
    end, how)[1]
    local chosen
    local function first(n)
        return hub.files(id, function()
            chosen = chosen or M.choose(all, card, opts, id)
            local part = {}
            for i = 1, math.min(n, #chosen) do part[i] = chosen[i] end
            return part
        end, how)
    end
    if not opts.limit then return first(math.huge) end
    local paths = first(1) -- of many files only those that hold the first `limit` records
    local left = opts.limit - count_of(paths[1], opts.limit)
    while left > 0 and #paths < #chosen do
        paths = first(#paths + 1)
        left = left - count_of(paths[#paths], left)
    end
    return paths
end

local function from_folder(dir, opts)
    local names = require("lolcats.hub").tree(dir)
    local out = {}
    for i, name in ipairs(M.choose(names, dir .. "/README.md", opts, dir)) do out[i] = dir .. "/" .. name end
    return out
end

--- The files that a name stands for: {paths}, their format. opts: config, split, revision, offline.
function M.find(source, opts)
    opts = opts or {}
    if source == "chitchat" then return { require("lolcats.data.chitchat").path() }, "jsonl" end
    local paths
    if files.is_folder(source) then
        paths = from_folder(source, opts)
    elseif files.exists(source) then
        paths = { source }
    elseif M.format_of(source) then
        lc.fail("no data '%s': there is no such file", source)
    else
        local name, config, split = source:match "^([^:]+):?([^:]*):?([^:]*)$"
        local id, revision = (name or ""):match "^([%w][%w%-%._]*/[%w][%w%-%._]*)@?(.*)$"
        if not id then
            lc.fail("no data '%s': there is no such file, and it is neither a data set of a Hub (owner/name, owner/name:config:split) nor chitchat",
                    source)
        end
        paths = from_hub(id, setmetatable({ config = opts.config or config ~= "" and config or nil, split = opts.split or split ~= "" and split or nil,
                                            revision = opts.revision or revision ~= "" and revision or nil }, { __index = opts }))
    end
    local format = M.format_of(paths[1])
    if not format then lc.fail("%s: which format? Names of data files end in %s", paths[1], KINDS) end
    return paths, format
end

-- ---- reading ------------------------------------------------------------------------------------------------------
-- A whole text with one object that holds the records, as some data sets have them.
local function inner(value)
    return type(value) == "table" and value[1] == nil and type(value.data) == "table" and value.data[1] ~= nil and value.data or nil
end

--- An iterator over the records of files: record, where it stands. Texts come as strings, pieces of about 4 MB.
function M.each(paths)
    local at, reader, count, list, list_at = 0, nil, 0, nil, 0
    local function pull()
        if list then
            list_at = list_at + 1
            if list[list_at] ~= nil then return list[list_at] end
            list = nil
        end
        while true do
            if reader then
                local v = reader:next()
                if v ~= nil then
                    local whole = M.format_of(paths[at]) == "json" and inner(v)
                    if whole then
                        list, list_at = whole, 1
                        return whole[1]
                    end
                    return v
                end
                reader = nil
            end
            at, count = at + 1, 0
            if not paths[at] then return nil end
            reader = records.open(paths[at])
        end
    end
    return function()
        local v = pull()
        if v == nil then return nil end
        count = count + 1
        return v, ("%s: record %d"):format(paths[at] or paths[#paths], count)
    end
end

--- All records of a source as one table. opts: as for find, and limit.
function M.records(source, opts)
    local out, limit = {}, opts and opts.limit or math.huge
    for record in M.each((M.find(source, opts))) do
        if #out >= limit then break end
        out[#out + 1] = record
    end
    return out
end

return M
