-- hub_server.lua: a server that behaves like a Hub, and misbehaves like a network, for test_hub.lua: lolcats
-- tests/lua/hub_server.lua FOLDER. Listens on 127.0.0.1, writes its port to FOLDER/port and one line a request to FOLDER/log,
-- and ends at GET /quit or after two minutes without a request. What FOLDER/repo holds is the repository org/folder. Large files
-- come from "another host": localhost.
local ffi = require "ffi"
local lc = require "lolcats"
ffi.cdef [[
int socket(int, int, int); int bind(int, const void *, uint32_t); int listen(int, int);
int getsockname(int, void *, uint32_t *); int accept(int, void *, void *); long send(int, const void *, size_t, int);
long recv(int, void *, size_t, int); int close(int); int fork(void); void _exit(int); int usleep(uint32_t);
void (*signal(int, void (*)(int)))(int); struct pollfd { int fd; short events, revents; }; int poll(struct pollfd *, unsigned long, int);
int setsockopt(int, int, int, const void *, uint32_t); struct hub_linger { int on, seconds; };
]]
local C = ffi.C
local folder = arg[1]
local COMMIT = ("c0ffee"):rep(7):sub(1, 40)

-- ---- what it holds ------------------------------------------------------------------------------------------------
local function pattern(n)
    local out, x = {}, 12345
    for i = 1, n do
        x = (x * 1103515245 + 12345) % 2147483648
        out[i] = string.char(math.floor(x / 65536) % 256)
    end
    return table.concat(out)
end
local BIG = pattern(300000)

local function small(text) return { text = text, etag = lc.files.sha256(text):sub(1, 40) } end
local function large(text, o)
    o = o or {}
    o.text, o.large, o.etag = text, true, o.etag or lc.files.sha256(text)
    return o
end

local repos = {}
local function repo(id, files, o)
    o = o or {}
    o.files = files
    repos[id] = o
end
local CONFIG = small '{"model_type": "llama"}'
local function model(file) return { ["config.json"] = CONFIG, ["model.safetensors"] = file } end

repo("org/good", { ["config.json"] = CONFIG, ["tokenizer.json"] = small "{}", ["README.md"] = small "# read me",
                   ["model.safetensors"] = large(BIG), ["sub/dir/note.txt"] = small "a note", ["empty.txt"] = small "" })
repo("org/shards", { ["config.json"] = CONFIG, ["model-00001-of-00002.safetensors"] = large(BIG .. "1"),
                     ["model-00002-of-00002.safetensors"] = large(BIG .. "2"), ["model-extra.safetensors"] = large "not named",
                     ["model.safetensors.index.json"] = small('{"weight_map": {"a": "model-00001-of-00002.safetensors", ' ..
                         '"b": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}}') })
repo("org/gguf", { ["a.Q4_0.gguf"] = large "one", ["a.Q8_0.gguf"] = large "two" })
repo("org/gated", model(large(BIG)), { token = "good-token", gated = true })
repo("org/private", model(large(BIG)), { token = "good-token" })
repo("org/busy", model(large(BIG)), { busy = 2 })
repo("org/alwaysbusy", model(large(BIG)), { busy = 1e9 })
repo("org/flaky", model(large(BIG, { fail = 2 })))
repo("org/drop", model(large(BIG, { drop = { 100000, 50000, 1 } })))
repo("org/deaf", model(large(BIG, { drop = { 100000 }, deaf = true })))
repo("org/shifted", model(large(BIG, { drop = { 100000 }, shift = 1 })))
repo("org/dead", model(large(BIG, { drop_all = 100000 })))
repo("org/short", model(large(BIG, { size = #BIG + 10 })))
repo("org/long", model(large(BIG, { size = #BIG - 10 })))
repo("org/badhash", model(large(BIG, { etag = lc.files.sha256 "other" })))
repo("org/badonce", model(large(BIG, { wrong = 1 })))
repo("org/slow", model(large(BIG, { slow = 20000 })))
repo("org/expired", model(large(BIG, { drop = { 100000 }, signed = 0 })))
repo("org/evil", { ["config.json"] = CONFIG, ["../../../evil.txt"] = small "x" })
repo("org/eviletag", { ["config.json"] = { text = "{}", etag = "../../../evil" } })
repo("org/loop", model(large(BIG, { loop = true })))
repo("org/data", { ["README.md"] = small "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test.jsonl\n---\n",
                   ["data/train-00000.jsonl"] = small '{"text": "first"}\n', ["data/train-00001.jsonl"] = small '{"text": "second"}\n',
                   ["data/test.jsonl"] = small '{"text": "held"}\n' }, { kind = "dataset" })
repo("org/plain", { ["README.md"] = small "no list", ["train.jsonl"] = small '{"text": "t"}\n', ["validation.jsonl"] = small '{"text": "v"}\n',
                    ["en/train.jsonl"] = small '{"text": "e"}\n' }, { kind = "dataset" })

-- A folder that the test has filled: FOLDER/repo is org/folder, large files those of weights.
local function from_folder(dir)
    local held = {}
    for _, name in ipairs(lc.files.list(dir)) do
        local text = lc.files.read(dir .. "/" .. name)
        held[name] = name:match "%.safetensors$" and large(text) or small(text)
    end
    repo("org/folder", held)
end
if lc.files.is_folder(folder .. "/repo") then from_folder(folder .. "/repo") end

-- ---- sockets ------------------------------------------------------------------------------------------------------
C.signal(17, ffi.cast("void (*)(int)", 1)) -- children are not waited for
C.signal(13, ffi.cast("void (*)(int)", 1))
local server = C.socket(2, 1, 0)
local address = ffi.new("uint8_t[16]", { 2, 0, 0, 0, 127, 0, 0, 1 })
assert(C.bind(server, address, 16) == 0 and C.listen(server, 64) == 0, "cannot listen")
local size = ffi.new("uint32_t[1]", 16)
C.getsockname(server, address, size)
local port = address[2] * 256 + address[3]
lc.files.write(folder .. "/port", tostring(port))

local function receive(fd)
    local buffer, text = ffi.new("char[8192]"), ""
    while not text:find "\r\n\r\n" do
        local n = tonumber(C.recv(fd, buffer, 8192, 0))
        if n <= 0 then return nil end
        text = text .. ffi.string(buffer, n)
    end
    return text
end

local function send(fd, text, step)
    local at = 0
    while at < #text do
        local n = tonumber(C.send(fd, ffi.cast("const char *", text) + at, math.min(step or #text, #text - at), 0))
        if n <= 0 then return end
        at = at + n
        if step then C.usleep(100000) end
    end
end

-- ---- answers ------------------------------------------------------------------------------------------------------
local NAMES = { [200] = "OK", [206] = "Partial Content", [302] = "Found", [307] = "Temporary Redirect", [401] = "Unauthorized",
                [403] = "Forbidden", [404] = "Not Found", [429] = "Too Many Requests", [503] = "Unavailable" }

local function answer(status, headers, body, o)
    return { status = status, headers = headers or {}, body = body or "", o = o or {} }
end

local function refusal(status, code, message, more)
    local headers = { "X-Error-Code: " .. (code or ""), "X-Error-Message: " .. (message or "") }
    for _, line in ipairs(more or {}) do headers[#headers + 1] = line end
    return answer(status, headers, message or "")
end

local function guard(r, request)
    if (r.busy or 0) > 0 then
        r.busy = r.busy - 1
        return refusal(429, nil, "slow down", { "Retry-After: 1" })
    end
    if not r.token or request.token == r.token then return nil end
    if r.gated then return refusal(request.token and 403 or 401, "GatedRepo", "Access to this repo is restricted") end
    return refusal(401, "RepoNotFound", "Repository not found")
end

local function unquote(s) return (s:gsub("%%(%x%x)", function(h) return string.char(tonumber(h, 16)) end)) end

local function content(file, request)
    if file.loop then return answer(302, { "Location: " .. request.path }) end
    if (file.fail or 0) > 0 then
        file.fail = file.fail - 1
        return refusal(503, nil, "out for a moment")
    end
    local text = file.text
    if (file.wrong or 0) > 0 then
        file.wrong = file.wrong - 1
        text = text:reverse()
    end
    local from = not file.deaf and request.range or 0
    local o = { step = file.slow }
    if file.drop_all then o.cut = file.drop_all end
    if file.drop and #file.drop > 0 then o.cut = table.remove(file.drop, 1) end
    if file.drop_all and from > 0 then o.cut = 0 end
    if from == 0 or from >= #text then return answer(200, {}, text, o) end
    local at = from + (file.shift or 0)
    return answer(206, { ("Content-Range: bytes %d-%d/%d"):format(at, #text - 1, #text) }, text:sub(at + 1), o)
end

local function route(request)
    local path = request.path
    if path == "/quit" then os.exit(0) end
    local id, name, signature = path:match "^/cdn/([^/]+/[^/]+)/(.+)%?sig=(%d+)$"
    if id then
        local file = repos[id].files[unquote(name)]
        if file.signed and tonumber(signature) ~= file.signed then return refusal(403, nil, "Request has expired") end
        local a = content(file, request)
        if file.signed and a.o.cut then file.signed = -1 end -- what was signed before the break is too old after it
        return a
    end
    local kind
    kind, id, name = path:match "^/api/(%a+)s/([^/]+/[^/]+)/revision/(.+)$"
    if id == "org/old" then return answer(307, { "Location: " .. path:gsub("org/old", "org/good") }) end
    if id then
        local r = repos[id]
        if not r or (r.kind or "model") ~= kind then return refusal(401, "RepoNotFound", "Repository not found") end
        local no = guard(r, request)
        if no then return no end
        if name ~= "main" and name ~= COMMIT and unquote(name) ~= "refs/pr/1" then return refusal(404, "RevisionNotFound", "Invalid rev id: " .. name) end
        local names = {}
        for file in pairs(r.files) do names[#names + 1] = { rfilename = file } end
        table.sort(names, function(a, b) return a.rfilename < b.rfilename end)
        return answer(200, { "Content-Type: application/json" }, lc.files.to_json { id = id, sha = COMMIT, siblings = names })
    end
    kind, id, name = "model", path:match "^/([^/]+/[^/]+)/resolve/[^/]+/(.+)$"
    if not id then kind, id, name = "dataset", path:match "^/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)$" end
    if id == "org/old" then return answer(307, { "Location: " .. path:gsub("org/old", "org/good") }) end
    local r = id and repos[id]
    if not r or (r.kind or "model") ~= kind then return refusal(404, "RepoNotFound", "Repository not found") end
    local no = guard(r, request)
    if no then return no end
    local file = r.files[unquote(name)]
    if not file then return refusal(404, "EntryNotFound", "Entry not found", { "X-Repo-Commit: " .. COMMIT }) end
    if not file.large then return answer(200, { "X-Repo-Commit: " .. COMMIT, 'ETag: "' .. file.etag .. '"' }, file.text) end
    if file.signed then file.signed = math.max(1, file.signed + (file.signed < 0 and 3 or 1)) end
    return answer(302, { "X-Repo-Commit: " .. COMMIT, 'X-Linked-Etag: "' .. file.etag .. '"', "X-Linked-Size: " .. (file.size or #file.text),
                         ("Location: http://localhost:%d/cdn/%s/%s?sig=%d"):format(port, id, name, file.signed or 1) })
end

local log = io.open(folder .. "/log", "w")
local waiting = ffi.new("struct pollfd[1]")
while true do
    waiting[0].fd, waiting[0].events = server, 1
    if C.poll(waiting, 1, 120000) == 0 then os.exit(0) end
    local fd = C.accept(server, nil, nil)
    local text = fd >= 0 and receive(fd)
    if text then
        local method, path = text:match "^(%S+) (%S+)"
        local request = { path = path, range = tonumber(text:match "[Rr]ange: bytes=(%d+)%-"), token = text:match "[Aa]uthorization: Bearer (%S+)" }
        log:write(method, " ", path, " host=", text:match "[Hh]ost: ([^\r:]+)", " token=", request.token or "-", " range=", tostring(request.range or "-"), "\n")
        log:flush()
        local a = route(request)
        local head = { ("HTTP/1.1 %d %s"):format(a.status, NAMES[a.status]), "Content-Length: " .. #a.body, "Connection: close" }
        for _, line in ipairs(a.headers) do head[#head + 1] = line end
        if C.fork() == 0 then
            C.close(server)
            send(fd, table.concat(head, "\r\n") .. "\r\n\r\n")
            local body = method == "GET" and a.body or ""
            if a.o.cut then
                send(fd, body:sub(1, a.o.cut))
            else
                send(fd, body, a.o.step)
            end
            C.close(fd)
            C._exit(0)
        end
    end
    if fd >= 0 then C.close(fd) end
end
