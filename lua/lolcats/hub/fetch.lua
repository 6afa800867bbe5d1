-- fetch.lua: the files of one repository of a Hub in the cache that huggingface_hub's tools share: blobs named by etag, snapshots
-- of links to them, refs, locks. A file grows as blobs/ETAG.incomplete, goes on there after a break, and gets its name when its
-- length is right and, for a large file, its SHA-256 (which is its etag).
local lc = require "lolcats"
local files = require "lolcats.files"
local http = require "lolcats.core.http"
local log = require "lolcats.log"
local web = require "lolcats.hub.web"

local M = {}

--- The folder of the Hugging Face cache.
function M.cache()
    return web.expand(web.env "HF_HUB_CACHE" or web.env "HUGGINGFACE_HUB_CACHE" or web.hf_home() .. "/hub")
end

-- A name that stays inside the folder it is put into.
local function is_tame(name)
    if name == "" or name:find "[%z\\\r\n]" or name:match "^/" or name:match "/$" then return false end
    for part in (name .. "/"):gmatch "([^/]*)/" do
        if part == "" or part == "." or part == ".." then return false end
    end
    return true
end
M.is_tame = is_tame

local function amount(n) return n < 1e6 and ("%.0f kB"):format(n / 1e3) or log.bytes(n) end

local Repo = {}
Repo.__index = Repo

--- A repository: id "owner/name", kind "model" or "dataset", revision (main).
function M.repo(id, kind, revision)
    kind, revision = kind or "model", revision or "main"
    if not id:match "^[%w][%w%-%._]*/[%w][%w%-%._]*$" and not id:match "^[%w][%w%-%._]*$" then lc.fail("'%s' is no name of a repository (owner/name)", id) end
    if not is_tame(revision) then lc.fail("'%s' is no revision of a repository: a branch, a tag or a commit", revision) end
    local folder = kind .. "s--" .. id:gsub("/", "--")
    return setmetatable({ id = id, type = kind, revision = revision, folder = folder, root = M.cache() .. "/" .. folder }, Repo)
end

local function is_commit(s) return #s == 40 and not s:find "[^%x]" end

--- The commit of the revision as the cache knows it, or nil.
function Repo:cached_commit()
    if is_commit(self.revision) then
        return files.is_folder(self.root .. "/snapshots/" .. self.revision) and self.revision or nil
    end
    local ref = self.root .. "/refs/" .. self.revision
    local commit = files.is_file(ref) and files.read(ref):match "^%s*(%x+)%s*$"
    if commit and files.is_folder(self.root .. "/snapshots/" .. commit) then return commit end
    if files.is_folder(self.root .. "/snapshots/" .. self.revision) then return self.revision end
end

function Repo:snapshot(commit) return self.root .. "/snapshots/" .. commit end

local function api(self, endpoint)
    return ("%s/api/%ss/%s/revision/%s"):format(endpoint, self.type, self.id, web.quote(self.revision))
end

local function file_url(self, endpoint, commit, name)
    return ("%s/%s%s/resolve/%s/%s"):format(endpoint, self.type == "dataset" and "datasets/" or "", self.id, commit, web.quote(name, true))
end

--- {commit =, files = {names}} as the Hub has them now; nil and a raising function when it cannot be reached or refuses.
function Repo:list(w, tries)
    local r
    w:run { function() r = w:ask("GET", api(self, w.endpoint), { tries = tries }) end }
    if r.problem or r.status ~= 200 then return nil, r end
    local info = files.parse_json(r.body, "the answer of " .. r.url)
    local commit = type(info) == "table" and info.sha
    if type(commit) ~= "string" or not is_commit(commit) or type(info.siblings) ~= "table" then
        lc.fail("%s does not answer as a Hub does (no commit and list of files at %s); check HF_ENDPOINT", w.endpoint, r.url)
    end
    local names = {}
    for _, entry in ipairs(info.siblings) do
        local name = type(entry) == "table" and entry.rfilename
        if type(name) ~= "string" or not is_tame(name) then
            lc.fail("%s lists the file '%s', whose name would leave the cache's folder: refused", self.id, tostring(name))
        end
        names[#names + 1] = name
    end
    return { commit = commit, files = names }
end

-- ---- one file -----------------------------------------------------------------------------------------------------
-- The snapshot's name for a blob. Where the file system knows no links the blob itself goes there, as Python's tools do it.
local function link(self, etag, pointer, name)
    local _, depth = name:gsub("/", "")
    local ok, why = false, nil
    if not web.is_on "HF_HUB_DISABLE_SYMLINKS" then ok, why = pcall(http.make_link, ("../"):rep(depth + 2) .. "blobs/" .. etag, pointer) end
    if not ok and not pcall(files.rename, self.root .. "/blobs/" .. etag, pointer) then error(why, 0) end
end

local function meta_of(w, self, commit, name)
    local r = w:ask("HEAD", file_url(self, w.endpoint, commit, name), {
        stop = function(r) return r.headers["x-linked-etag"] ~= nil or web.origin(r.redirect) ~= web.origin(w.endpoint) end,
    })
    local moved = r.status >= 300 and r.status < 400
    if r.problem or not (r.status == 200 or moved) then w:explain(r, self, commit, name) end
    local etag = (r.headers["x-linked-etag"] or r.headers["etag"] or ""):gsub("^W/", ""):gsub('"', "")
    if etag == "" or #etag > 200 or not etag:match "^[%w][%w%-%._]*$" then
        lc.fail("%s gives no etag that can name a file ('%s') for %s/%s", w.endpoint, etag, self.id, name)
    end
    local size = tonumber(r.headers["x-linked-size"] or not moved and r.headers["content-length"] or nil)
    return { etag = etag, size = size, url = moved and r.redirect or r.url, name = name }
end

local function too_little_room(self, meta, have)
    local free, need = http.disk_free(self.root), meta.size and meta.size - have
    if free and need and need > free then
        lc.fail("%s/%s takes %s more, and the disk of %s has %s free; HF_HUB_CACHE names another folder", self.id, meta.name,
                amount(need), M.cache(), amount(free))
    end
end

local function size_of(path)
    local f = io.open(path, "rb")
    if not f then return 0 end
    local n = f:seek "end"
    f:close()
    return n or 0
end

-- What is wrong with a file that came whole, or nil.
local function fault(meta, bytes, sha256)
    if meta.size and bytes ~= meta.size then return ("%.0f bytes came where %.0f were announced"):format(bytes, meta.size) end
    if #meta.etag == 64 and not meta.etag:find "%X" and sha256 ~= meta.etag:lower() then
        return ("its sha256 is %s, expected %s"):format(sha256, meta.etag)
    end
end

-- One request for what is missing of a file; returns its answer. A signed address of another host lives for an hour or so: when it
-- is refused, the Hub is asked for a new one.
local function get(w, self, commit, meta, path, state)
    for renewed = 0, 5 do
        local r = w:ask("GET", meta.url, { path = path, on_start = function(id) state.id = id end })
        local refused = r.status == 401 or r.status == 403 or r.status == 404 or r.status == 410
        if not refused or r.problem or renewed == 5 or web.origin(meta.url) == web.origin(w.endpoint) then return r end
        local again = meta_of(w, self, commit, meta.name)
        if again.etag ~= meta.etag then lc.fail("%s/%s changed while it was fetched; try again", self.id, meta.name) end
        meta.url = again.url
    end
end

-- The bytes to blobs/ETAG.incomplete. A file that turns out wrong is thrown away and fetched once more from its beginning.
local function download(w, self, commit, meta, blob, state)
    local path = blob .. ".incomplete"
    for attempt = 1, 2 do
        local have = size_of(path)
        if meta.size and have > meta.size then
            files.remove(path)
            have = 0
        end
        too_little_room(self, meta, have)
        local bytes, sha256
        if have > 0 and have == meta.size then
            bytes, sha256 = have, http.sha256_file(path)
        else
            local r = get(w, self, commit, meta, path, state)
            if r.problem then
                lc.fail("%s/%s broke off after %s (%s); the same command goes on from there", self.id, meta.name, amount(r.bytes), r.problem)
            end
            if r.status ~= 200 and r.status ~= 206 and r.status ~= 416 then w:explain(r, self, self.revision, meta.name) end
            bytes, sha256 = r.bytes, r.sha256
        end
        state.done = bytes
        local wrong = fault(meta, bytes, sha256)
        if not wrong then return files.rename(path, blob) end
        files.remove(path)
        state.done = 0
        if attempt == 2 then
            lc.fail("%s/%s is not what the Hub announced: %s, twice; it was thrown away. A proxy or mirror may change files: try again " ..
                    "or set HF_ENDPOINT", self.id, meta.name, wrong)
        end
        log.say("%s/%s: %s; fetching it again", self.id, meta.name, wrong)
    end
end

local function fetch_file(w, self, commit, name, progress)
    local pointer = self:snapshot(commit) .. "/" .. name
    if files.exists(pointer) then return end
    local meta = meta_of(w, self, commit, name)
    local blob = self.root .. "/blobs/" .. meta.etag
    local locks = M.cache() .. "/.locks/" .. self.folder
    files.make_dirs(self.root .. "/blobs")
    files.make_dirs(files.dirname(pointer))
    files.make_dirs(locks)
    local state = { done = 0, size = meta.size or 0 }
    progress[#progress + 1] = state
    local lock = w:lock(("%s/%s.lock"):format(locks, meta.etag), self.id .. "/" .. name)
    if not files.exists(blob) then download(w, self, commit, meta, blob, state) end
    state.done, state.id = state.size, nil
    if not files.exists(pointer) then link(self, meta.etag, pointer, name) end
    w:unlock(lock)
end

-- ---- all of them --------------------------------------------------------------------------------------------------
local function write_ref(self, commit)
    if self.revision == commit then return end
    local path = self.root .. "/refs/" .. self.revision
    if files.is_file(path) and files.read(path) == commit then return end
    files.make_dirs(files.dirname(path))
    files.write(path, commit)
end

-- One line: files, bytes, rate over the last seconds, time left.
local function watcher(w, self, progress, count)
    local quiet = w.quiet or web.is_on "HF_HUB_DISABLE_PROGRESS_BARS"
    local live = log.is_terminal(2)
    local every, last, marks, drawn = live and 0.2 or 30, lc.now(), {}, false
    local function sums()
        local done, size, whole = 0, 0, 0
        for _, s in ipairs(progress) do
            if s.id then s.done = w.client:bytes(s.id) end
            done, size = done + s.done, size + math.max(s.size, s.done)
            if s.done >= s.size and not s.id then whole = whole + 1 end
        end
        return done, size, whole
    end
    local function tick()
        local now = lc.now()
        if quiet or now - last < every then return end
        last = now
        local done, size, whole = sums()
        marks[#marks + 1] = { now, done }
        while #marks > 2 and now - marks[1][1] > 20 do table.remove(marks, 1) end
        local rate = (done - marks[1][2]) / math.max(1e-3, now - marks[1][1])
        if size == 0 then return end
        local line = ("%s  %d/%d files  %s of %s%s%s"):format(self.id, whole, count, amount(done), amount(size),
            rate > 0 and ("  %.1f MB/s"):format(rate / 1e6) or "", rate > 0 and "  eta " .. log.duration((size - done) / rate) or "")
        io.stderr:write(live and "\r" or "", line, live and "\27[K" or "\n")
        drawn = live
    end
    return tick, function()
        if drawn then io.stderr:write "\r\27[K" end
        return (sums())
    end
end

local TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache: backups may leave it out. https://bford.info/cachedir/\n"

--- Brings files of a commit into the cache; returns the snapshot's folder.
function Repo:fetch(w, commit, names)
    local missing = {}
    for _, name in ipairs(names) do
        if not is_tame(name) then lc.fail("'%s' is no name of a file in a repository", name) end
        if not files.exists(self:snapshot(commit) .. "/" .. name) then missing[#missing + 1] = name end
    end
    if #missing > 0 then
        local progress, tasks = {}, {}
        files.make_dirs(self:snapshot(commit))
        if not files.exists(M.cache() .. "/CACHEDIR.TAG") then files.write(M.cache() .. "/CACHEDIR.TAG", TAG) end
        for i, name in ipairs(missing) do
            tasks[i] = function() fetch_file(w, self, commit, name, progress) end
        end
        local tick, finish = watcher(w, self, progress, #missing)
        local start = lc.now()
        local ok, problem = pcall(w.run, w, tasks, 8, tick)
        if not ok then
            if log.is_terminal(2) and not w.quiet then io.stderr:write "\r\27[K" end
            error(problem, 0)
        end
        local bytes = finish()
        if not w.quiet and bytes > 1e6 then
            log.say("fetched %s of %s in %s", amount(bytes), self.id, log.duration(lc.now() - start))
        end
    end
    pcall(write_ref, self, commit) -- a cache that cannot be written to still serves
    return self:snapshot(commit)
end

return M
