-- web.lua: asks a Hub: several questions side by side as coroutines, each with redirects (the token stays with the host it
-- is for), patience (lost connections, 429 with Retry-After, 5xx) and errors that say what to do. Knows no cache.
local lc = require "lolcats"
local http = require "lolcats.core.http"
local log = require "lolcats.log"
local files = require "lolcats.files"

local M = {}

local function env(name)
    local v = os.getenv(name)
    if v and v ~= "" then return v end
end
M.env = env

local function is_on(v) return v ~= nil and ({ ["1"] = true, on = true, yes = true, ["true"] = true })[v:lower()] == true end
M.is_on = function(name) return is_on(env(name)) end

-- ---- where and as whom --------------------------------------------------------------------------------------------
function M.endpoint()
    local url = (env "HF_ENDPOINT" or "https://huggingface.co"):gsub("/+$", "")
    if not url:match "^https?://[^/]" then lc.fail("HF_ENDPOINT is '%s'; it is an address such as https://huggingface.co", url) end
    return url
end

local function home() return env "HOME" or "." end

-- A leading ~ and $NAME in a path, as the Python client reads them.
local function expand(path)
    return (path:gsub("^~", home()):gsub("%$(%b{})", function(n) return env(n:sub(2, -2)) end)
                :gsub("%$([%a_][%w_]*)", function(n) return env(n) end))
end
M.expand = expand

function M.hf_home() return expand(env "HF_HOME" or (env "XDG_CACHE_HOME" or home() .. "/.cache") .. "/huggingface") end

local given, given_by -- a token that the command line has

--- Sends this token from now on. from: what messages call its place.
function M.use_token(token, from) given, given_by = token, from end

--- The token to send and where it is from; nil without one.
function M.token()
    if given then return given, given_by end
    if M.is_on "HF_HUB_DISABLE_IMPLICIT_TOKEN" then return nil end
    for _, name in ipairs { "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN" } do
        local v = env(name)
        v = v and v:gsub("%s", "")
        if v and v ~= "" then return v, name end
    end
    local path = expand(env "HF_TOKEN_PATH" or M.hf_home() .. "/token")
    if files.is_file(path) then
        local v = files.read(path):gsub("%s", "")
        if v ~= "" then return v, path end
    end
end

function M.offline() return M.is_on "HF_HUB_OFFLINE" or M.is_on "TRANSFORMERS_OFFLINE" end

-- scheme://host:port of a URL.
local function origin(url)
    local scheme, authority = url:match "^(%a[%w+.-]*)://([^/?#]*)"
    if not scheme then return nil end
    scheme, authority = scheme:lower(), authority:gsub("^.*@", ""):lower()
    if not authority:match ":%d+$" then authority = authority .. (scheme == "https" and ":443" or ":80") end
    return scheme .. "://" .. authority, scheme
end
M.origin = origin

-- The same for people.
local function host(url) return ((origin(url) or url):gsub("^(https://.*):443$", "%1"):gsub("^(http://.*):80$", "%1")) end
M.host = host

--- A path or revision as part of a URL.
function M.quote(text, keep_slash)
    return (text:gsub(keep_slash and "[^%w%-%._~/]" or "[^%w%-%._~]", function(c) return ("%%%02X"):format(c:byte()) end))
end

-- ---- many at once -------------------------------------------------------------------------------------------------
local Web = {}
Web.__index = Web

--- Asks as lolcats. opts.quiet: no progress.
function M.new(opts)
    local token, from = M.token()
    return setmetatable({ endpoint = M.endpoint(), token = token, token_from = from, client = http.client("lolcats/" .. lc.version),
                          waiting = {}, asleep = {}, locks = {}, quiet = opts and opts.quiet }, Web)
end

local function resume(self, task, ...)
    local ok, what, value = coroutine.resume(task.run, ...)
    if not ok then error(what, 0) end
    if coroutine.status(task.run) == "dead" then
        task.done = true
    elseif what == "http" then
        self.waiting[value] = task
    else
        self.asleep[#self.asleep + 1] = { task = task, at = lc.now() + value }
    end
end

local function wake(self)
    local now = lc.now()
    for i = #self.asleep, 1, -1 do
        local s = self.asleep[i]
        if s.at <= now then
            table.remove(self.asleep, i)
            resume(self, s.task)
        end
    end
end

local function loop(self, functions, most, tick)
    local active, next_one = {}, 1
    while true do
        for i = #active, 1, -1 do
            if active[i].done then table.remove(active, i) end
        end
        while #active < most and functions[next_one] do
            local f = functions[next_one]
            local task = { run = coroutine.create(f) }
            active[#active + 1], next_one = task, next_one + 1
            resume(self, task, self)
        end
        if #active == 0 and not functions[next_one] then return end
        local id = self.client:wait(next(self.asleep) and 0.05 or 0.2)
        local task = id and self.waiting[id]
        if task then
            self.waiting[id] = nil
            resume(self, task)
        end
        wake(self)
        if tick then tick() end
    end
end

--- Runs functions as coroutines, at most `most` at once. What one raises, Ctrl-C among it, ends all: files keep what came.
function Web:run(functions, most, tick)
    local ok, problem = pcall(loop, self, functions, most or 8, tick)
    if ok then return end
    self:close()
    error(problem, 0)
end

function Web:sleep(seconds) coroutine.yield("sleep", seconds) end

--- A lock that another process may hold for long.
function Web:lock(path, what)
    local said
    while true do
        local ok, lock = pcall(files.lock, path)
        if ok then
            self.locks[lock] = true
            return lock
        end
        if not tostring(lock):find("another process holds it", 1, true) then error(lock, 0) end
        if not said and not self.quiet then log.say("waiting for another process that fetches %s", what) end
        said = true
        self:sleep(0.3)
    end
end

function Web:unlock(lock)
    self.locks[lock] = nil
    lock.unlock()
end

function Web:close()
    for lock in pairs(self.locks) do lock.unlock() end
    self.locks = {}
    self.client:close()
end

-- ---- one question -------------------------------------------------------------------------------------------------
local HEADERS = { "X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size", "ETag", "Content-Length", "Retry-After", "X-Error-Code",
                  "X-Error-Message", "RateLimit" }

local function once(self, method, url, path, on_start)
    local headers = { "Accept-Encoding: identity" }
    if self.token and origin(url) == origin(self.endpoint) then headers[2] = "Authorization: Bearer " .. self.token end
    local id = self.client:start(method, url, headers, path)
    if on_start then on_start(id) end
    coroutine.yield("http", id)
    local c = self.client
    local r = { url = url, status = c:status(id), problem = c:problem(id), redirect = c:redirect(id), bytes = c:bytes(id), headers = {} }
    for _, name in ipairs(HEADERS) do r.headers[name:lower()] = c:header(id, name) end
    local ok, why = true, nil
    if path then
        if (r.status == 200 or r.status == 206) and not r.problem then ok, why = pcall(function() r.sha256 = c:sync(id) end) end
    else
        r.body = c:body(id)
    end
    if on_start then on_start(nil) end
    c:finish(id)
    if not ok then error(why, 0) end
    return r
end

M.patience = { 1, 2, 4, 8, 15 } -- seconds before the second question, the third, ...
local PASSING = { [408] = true, [429] = true, [500] = true, [502] = true, [503] = true, [504] = true }

-- Seconds that an answer asks us to wait, at most five minutes.
local function asked_wait(r)
    local after = tonumber(r.headers["retry-after"]) or tonumber((r.headers["ratelimit"] or ""):match "t=(%d+)")
    return after and math.min(300, math.max(0, after))
end

-- A disk that is full, or a lock, does not pass with time.
local function is_ours(problem) return problem:find("^cannot write") ~= nil end

--- Asks until there is an answer or patience ends; returns it, with .problem where none came whole. opts: path (see http), tries,
--- stop (a function of a redirecting answer: this is the answer), on_start.
function Web:ask(method, url, opts)
    opts = opts or {}
    local tries, hops, had, start = 0, 0, -1, url
    while true do
        local r = once(self, method, url, opts.path, opts.on_start)
        local moved = r.status >= 300 and r.status < 400 and r.redirect
        if r.problem and is_ours(r.problem) then lc.fail("%s", r.problem) end
        if moved and not r.problem and not (opts.stop and opts.stop(r)) then
            hops = hops + 1
            if hops > 10 then lc.fail("%s leads from one address to the next more than ten times", start) end
            local _, from = origin(url)
            local _, to = origin(r.redirect)
            if from == "https" and to ~= "https" then lc.fail("%s leads from https to %s, which is refused", url, r.redirect) end
            url = r.redirect
        elseif r.problem or PASSING[r.status] then
            if r.bytes > had and opts.path then tries, had = 0, r.bytes end -- it went on: begin counting again
            tries = tries + 1
            local wait = asked_wait(r) or M.patience[tries]
            if tries > math.min(#M.patience, opts.tries or #M.patience) then return r end
            if wait >= 5 and not self.quiet then
                log.say("%s: %s; asking again in %d s", host(url), r.problem or ("answer " .. r.status), wait)
            end
            self:sleep(wait)
            if hops > 0 and r.problem == nil then url, hops = start, 0 end -- a signed address may have expired
        else
            return r
        end
    end
end

-- ---- what an answer means -----------------------------------------------------------------------------------------
local function about_token(self)
    if self.token then return ("The token is the one from %s."):format(self.token_from) end
    return ("No token was sent: make one at %s/settings/tokens and set HF_TOKEN (or write it to %s)."):format(self.endpoint,
        expand(env "HF_TOKEN_PATH" or M.hf_home() .. "/token"))
end

--- Raises what a failed answer means for a person. what: "owner/name", "revision 'x' of owner/name", "owner/name/file".
function Web:explain(r, repo, revision, file)
    local code, said = r.headers["x-error-code"], r.headers["x-error-message"]
    local page = ("%s/%s%s"):format(self.endpoint, repo.type == "dataset" and "datasets/" or "", repo.id)
    if r.problem or r.status == 0 then
        lc.fail("cannot reach %s: %s. Is there a network? (HF_HUB_OFFLINE=1 uses the Hugging Face cache alone, HF_ENDPOINT names a mirror)",
                host(r.url), r.problem or "no answer")
    elseif origin(r.url) ~= origin(self.endpoint) then
        lc.fail("%s answered %d when %s/%s was to be fetched; try again later", host(r.url), r.status, repo.id, file or "")
    elseif code == "GatedRepo" or (r.status == 403 and self.token) then
        lc.fail("%s is gated: accept its licence at %s with your account, then set HF_TOKEN to a token of that account. %s", repo.id, page,
                about_token(self))
    elseif code == "RevisionNotFound" then
        lc.fail("%s has no revision '%s'; its branches and tags are at %s/tree/main", repo.id, revision, page)
    elseif code == "EntryNotFound" then
        lc.fail("%s has no file %s (revision '%s')", repo.id, file or "?", revision)
    elseif r.status == 401 or r.status == 403 or code == "RepoNotFound" then
        lc.fail("%s does not exist at %s, or is private, and there is no such folder here: check the name. %s", repo.id, self.endpoint,
                about_token(self))
    elseif r.status == 404 then
        lc.fail("%s was not found at %s%s", file and repo.id .. "/" .. file or repo.id, self.endpoint,
                said and (" (" .. said .. ")") or "")
    elseif r.status == 429 then
        lc.fail("%s asks for fewer requests (429): try again later%s", self.endpoint,
                self.token and "" or "; with a token (HF_TOKEN) more are allowed")
    end
    lc.fail("%s answered %d%s to %s; try again later", host(r.url), r.status, said and (" (" .. said .. ")") or "", r.url)
end

return M
