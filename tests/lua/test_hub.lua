-- The Hub client against a server of our own (hub_server.lua) that behaves like the Hub and like a bad network: redirects, tokens,
-- gates, patience, broken and wrong downloads, two processes, Ctrl-C, and no network at all. Only loopback.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local here = (arg and arg[0] or ""):match("^(.*/)")
local ffi = require "ffi"
local lc = require "lolcats"
local files, hub = lc.files, lc.hub
ffi.cdef "int setenv(const char *, const char *, int); int unsetenv(const char *);"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)
require("lolcats.hub.web").patience = { 0.05, 0.05, 0.05, 0.05, 0.05 }
local program = os.getenv "LOLCATS_PROGRAM" or require("lolcats.program").path
local COMMIT = ("c0ffee"):rep(7):sub(1, 40)

local function setenv(name, value)
    if value then ffi.C.setenv(name, value, 1) else ffi.C.unsetenv(name) end
end
for _, name in ipairs { "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
                        "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY" } do setenv(name) end
setenv("HF_HOME", root .. "/hf")

local ok, why = pcall(function() require("lolcats.core.http").client "test":close() end)
if not ok then
    io.stdout:write("skipped: ", tostring(why), "\n")
    os.exit(77)
end

local model = lc.model { model_type = "llama", vocab_size = 50, hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2,
                         num_attention_heads = 2, num_key_value_heads = 1, rms_norm_eps = 1e-5, max_position_embeddings = 64 }
model:save_weights(root .. "/repo")
os.execute(("%s %shub_server.lua %s >%s/server.txt 2>&1 &"):format(program, here, root, root))
local limit = lc.now() + 20
while not files.is_file(root .. "/port") and lc.now() < limit do os.execute "sleep 0.05" end
local port = files.read(root .. "/port")
local endpoint = "http://127.0.0.1:" .. port
setenv("HF_ENDPOINT", endpoint)

local function seen() return files.read(root .. "/log") end
-- Requests of a path since a mark of the log.
local function requests(pattern, from)
    local n = 0
    for line in seen():sub((from or 0) + 1):gmatch "[^\n]+" do
        if line:find(pattern) then n = n + 1 end
    end
    return n
end
local function cache(id) return root .. "/hf/hub/models--" .. id:gsub("/", "--") end
local function fetched(id, o)
    o = o or {}
    o.quiet = true
    return hub.model(id, o)
end
local function refused(id, pattern, o) return t.errors(function() fetched(id, o) end, pattern) end
local function clean(id)
    local left = {}
    for _, name in ipairs(files.is_folder(cache(id) .. "/blobs") and files.list(cache(id) .. "/blobs") or {}) do
        if name:match "incomplete" then left[#left + 1] = name end
    end
    return left
end
local big

t.test("a model comes in the Hub's cache layout", function()
    setenv("HF_TOKEN", "secret-token")
    local dir = fetched "org/good"
    t.eq(dir, cache "org/good" .. "/snapshots/" .. COMMIT)
    t.eq(files.list(dir), { "config.json", "model.safetensors", "tokenizer.json" })
    t.eq(files.read(cache "org/good" .. "/refs/main"), COMMIT)
    big = files.read(dir .. "/model.safetensors")
    local blob = cache "org/good" .. "/blobs/" .. files.sha256(big)
    t.ok(files.is_file(blob) and #big == 300000)
    local link = io.popen("readlink " .. dir .. "/model.safetensors"):read "*l"
    t.eq(link, "../../blobs/" .. files.sha256(big))
    t.ok(files.is_file(root .. "/hf/hub/CACHEDIR.TAG"))
    t.eq(clean "org/good", {})
end)

t.test("the token goes to the Hub and never to the host that a redirect names", function()
    local log = seen()
    t.ok(log:find "GET /api/models/org/good/revision/main host=127.0.0.1 token=secret%-token", log)
    t.ok(log:find "HEAD /org/good/resolve/%x+/config.json host=127.0.0.1 token=secret%-token", log)
    t.ok(log:find "GET /cdn/org/good/model.safetensors%?sig=1 host=localhost token=%- range=%-", log)
    t.ok(not log:find "host=localhost token=secret", log)
    setenv("HF_TOKEN")
end)

t.test("a second load asks for the commit alone", function()
    local mark = #seen()
    fetched "org/good"
    t.eq({ requests("", mark), requests("/api/models/org/good", mark) }, { 1, 1 })
end)

t.test("lc.load by name", function()
    local loaded = lc.load("org/folder", { quiet = true })
    t.close(loaded:logits { 3, 1, 4, 1, 5 }, model:logits { 3, 1, 4, 1, 5 }, 0)
    t.eq(loaded.source, "org/folder")
end)

t.test("single files, folders in them, other revisions", function()
    local path = hub.file("org/good", "sub/dir/note.txt", { revision = "refs/pr/1" })
    t.eq(files.read(path), "a note")
    t.eq(files.read(cache "org/good" .. "/refs/refs/pr/1"), COMMIT)
    t.eq(files.read(hub.resolve("org/good/sub/dir/note.txt")), "a note")
    t.eq(files.read(hub.resolve("org/good@" .. COMMIT .. "") .. "/config.json"), '{"model_type": "llama"}')
    t.eq(files.read(hub.file("org/good", "empty.txt")), "")
end)

t.test("a file system without links: the file itself", function()
    setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    setenv("HF_HUB_CACHE", root .. "/nolinks")
    local dir = fetched "org/good"
    t.eq(io.popen("readlink " .. dir .. "/model.safetensors"):read "*l", nil)
    t.ok(files.read(dir .. "/model.safetensors") == big)
    setenv("HF_HUB_CACHE")
    setenv("HF_HUB_DISABLE_SYMLINKS")
end)

t.test("shards as the index names them", function()
    local dir = fetched "org/shards"
    t.eq(files.list(dir), { "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json" })
    t.eq(files.read(dir .. "/model-00002-of-00002.safetensors"), big .. "2")
end)

t.test("of several GGUF files one must be named", function()
    refused("org/gguf", "several GGUF files; name one, as in \"org/gguf/a.Q4_0.gguf\"")
    t.eq(files.read(hub.resolve "org/gguf/a.Q8_0.gguf"), "two")
end)

t.test("a renamed repository is followed", function() t.ok(files.is_file(fetched "org/old" .. "/model.safetensors")) end)

t.test("names and revisions that are not there", function()
    refused("org/none", "does not exist at http://127.*or is private.*No token was sent.*settings/tokens.*HF_TOKEN")
    refused("org/good", "no revision 'v9'", { revision = "v9" })
    t.errors(function() hub.file("org/good", "nothing.bin") end, "no file nothing.bin")
    refused("org/good", "no revision of a repository", { revision = "../x" })
end)

t.test("gated and private: what to do is said, and a token opens them", function()
    refused("org/gated", "gated: accept its licence at http://127.0.0.1:%d+/org/gated .*set HF_TOKEN.*No token was sent")
    setenv("HF_TOKEN", "bad")
    refused("org/gated", "gated.*The token is the one from HF_TOKEN")
    refused("org/private", "The token is the one from HF_TOKEN")
    setenv("HF_TOKEN")
    files.write(root .. "/hf/token", "good-token\n")
    t.ok(files.is_file(fetched "org/gated" .. "/model.safetensors"))
    setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    refused("org/private", "No token was sent")
    setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    files.remove(root .. "/hf/token")
    t.ok(not seen():find "host=localhost token=[^-]", "a token went to the other host")
end)

t.test("429 is waited for as long as it asks", function()
    local start = lc.now()
    fetched "org/busy"
    t.ok(lc.now() - start >= 2, "it did not wait")
end)

t.test("503 passes", function() t.ok(files.is_file(fetched "org/flaky" .. "/model.safetensors")) end)

t.test("dropped connections go on from where they were", function()
    local dir = fetched "org/drop"
    t.eq(files.sha256(files.read(dir .. "/model.safetensors")), files.sha256(big))
    local log = seen()
    t.ok(log:find "/cdn/org/drop/model.safetensors%?sig=1 host=localhost token=%- range=100000", log)
    t.ok(log:find "/cdn/org/drop/model.safetensors%?sig=1 host=localhost token=%- range=150000", log)
    t.ok(log:find "/cdn/org/drop/model.safetensors%?sig=1 host=localhost token=%- range=150001", log)
end)

t.test("a server that knows no ranges begins anew", function()
    t.eq(files.sha256(files.read(fetched "org/deaf" .. "/model.safetensors")), files.sha256(big))
end)

t.test("a signed address that is too old is asked for anew", function()
    t.eq(files.sha256(files.read(fetched "org/expired" .. "/model.safetensors")), files.sha256(big))
    local log = seen()
    t.ok(log:find "/cdn/org/expired/model.safetensors%?sig=1 host=localhost token=%- range=100000", log)
    t.ok(log:find "/cdn/org/expired/model.safetensors%?sig=2 host=localhost token=%- range=100000", log)
end)

t.test("wrong lengths and hashes are refused and leave nothing", function()
    for id, pattern in pairs { ["org/short"] = "300000 bytes came where 300010", ["org/long"] = "300000 bytes came where 299990",
                               ["org/badhash"] = "its sha256 is %x+, expected %x+" } do
        refused(id, pattern)
        t.eq(clean(id), {}, id)
        t.ok(not files.exists(cache(id) .. "/snapshots/" .. COMMIT .. "/model.safetensors"), id)
    end
    t.eq(files.sha256(files.read(fetched "org/badonce" .. "/model.safetensors")), files.sha256(big))
end)

t.test("names and etags that would leave the cache are refused", function()
    refused("org/evil", "would leave the cache")
    refused("org/eviletag", "no etag that can name a file")
    t.ok(not files.exists(root .. "/hf/evil") and not files.exists(root .. "/hf/evil.txt"))
end)

t.test("redirects without end are refused", function() refused("org/loop", "more than ten times") end)

t.test("lc.data reads data sets by name, config and split", function()
    local bytes = { size = 256, encode = function(_, s) return { s:byte(1, -1) } end, id = function(_, s) return s:byte() end }
    local function texts(name, o)
        o = o or {}
        o.tokenizer, o.eos, o.seq, o.quiet, o.shuffle = bytes, "~", 2, true, false
        local rows, out = lc.data(name, o), {}
        for i = 1, rows.rows do
            for _, id in ipairs(rows:row(i).ids:reshape(-1):totable()) do out[#out + 1] = string.char(id) end
        end
        return table.concat(out)
    end
    t.eq(require("lolcats.data").records("org/data", { limit = 1, quiet = true }), { { text = "first" } })
    local dir = root .. "/hf/hub/datasets--org--data/snapshots/" .. COMMIT .. "/data/"
    t.ok(files.exists(dir .. "train-00000.jsonl") and not files.exists(dir .. "train-00001.jsonl"), "it fetched more than it needs")
    t.eq(texts "org/data", "first~second") -- the last token needs one after it
    t.eq(texts "org/data:main:test", "held")
    t.eq(texts("org/data", { config = "main", split = "test" }), "held")
    t.eq(require("lolcats.data").records("org/plain", { split = "validation", quiet = true }), { { text = "v" } })
    t.errors(function() texts("org/data", { config = "other" }) end, "no config 'other'; it has main")
    t.errors(function() texts("org/plain", { split = "test" }) end, "no split 'test'; it has train, validation")
    t.errors(function() texts "org/nothing" end, "does not exist")
    t.eq(texts("org/data", { offline = true }), "first~second")
end)

t.test("a dataset's files by kind", function()
    local paths = hub.files("org/data", function(names)
        local out = {}
        for _, name in ipairs(names) do if name:match "%.jsonl$" then out[#out + 1] = name end end
        return out
    end, { type = "dataset", quiet = true })
    t.eq(#paths, 3)
    t.ok(paths[1]:find("/hub/datasets--org--data/snapshots/" .. COMMIT .. "/data/test.jsonl", 1, true), paths[1])
end)

-- ---- other processes ----------------------------------------------------------------------------------------------
local function child(code, log)
    files.write(root .. "/child.lua", code)
    os.execute(("env --default-signal=INT %s %s/child.lua >%s 2>&1 & echo $! >%s/child.pid"):format(program, root, log, root))
    return files.read(root .. "/child.pid"):match "%d+"
end
local function wait_for(f, seconds)
    local stop = lc.now() + (seconds or 10)
    while lc.now() < stop do
        if f() then return true end
        os.execute "sleep 0.05"
    end
    return false
end
local function gone(pid) return not files.exists("/proc/" .. pid) or not files.read("/proc/" .. pid .. "/cmdline"):find "child" end
local FETCH = 'local lc = require "lolcats" print(lc.hub.model("org/slow", {quiet = true}))'
local etag = files.sha256(big)

t.test("Ctrl-C ends a download, keeps what came, and gives no file its name", function()
    local pid = child(FETCH, root .. "/a.txt")
    local part = cache "org/slow" .. "/blobs/" .. etag .. ".incomplete"
    t.ok(wait_for(function() return files.is_file(part) and #files.read(part) >= 40000 end), "it did not begin")
    os.execute("kill -INT " .. pid)
    t.ok(wait_for(function() return gone(pid) end, 5), "it did not end")
    local n = #files.read(part)
    t.ok(n >= 40000 and n < 300000)
    t.ok(not files.exists(cache "org/slow" .. "/blobs/" .. etag))
    t.ok(not files.exists(cache "org/slow" .. "/snapshots/" .. COMMIT .. "/model.safetensors"))
    t.ok(big:sub(1, n) == files.read(part), "what was kept is not the beginning")
end)

t.test("two processes fetch one file once, and kill -9 costs nothing", function()
    local mark = #seen()
    local first = child(FETCH, root .. "/a.txt")
    t.ok(wait_for(function() return requests("GET /cdn/org/slow", mark) == 1 end), "the first did not begin")
    local second = child(FETCH, root .. "/b.txt")
    t.ok(wait_for(function() return requests("HEAD /org/slow/resolve/%x+/model.safetensors", mark) == 2 end), "the second did not ask")
    t.ok(wait_for(function() return gone(first) and gone(second) end, 20), "they did not end")
    t.eq(requests("GET /cdn/org/slow", mark), 1)
    t.ok(requests("GET /cdn/org/slow.* range=%d+", mark) == 1, "it did not go on from what was there")
    t.ok(files.read(root .. "/a.txt"):find(COMMIT) and files.read(root .. "/b.txt"):find(COMMIT), files.read(root .. "/b.txt"))
    t.eq(files.sha256(files.read(cache "org/slow" .. "/snapshots/" .. COMMIT .. "/model.safetensors")), etag)
    t.eq(clean "org/slow", {})
end)

t.test("a busy Hub does not keep from what the cache has", function()
    files.make_dirs(cache "org/alwaysbusy" .. "/snapshots/" .. COMMIT)
    files.make_dirs(cache "org/alwaysbusy" .. "/refs")
    files.write(cache "org/alwaysbusy" .. "/refs/main", COMMIT)
    t.ok(fetched "org/alwaysbusy":find(COMMIT))
end)

-- ---- no network ---------------------------------------------------------------------------------------------------
t.test("offline: the cache alone, and no request", function()
    local mark = #seen()
    for _, name in ipairs { "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE" } do
        setenv(name, "1")
        t.ok(files.is_file(fetched "org/good" .. "/model.safetensors"))
        refused("org/never", "Hugging Face cache.*models%-%-org%-%-never.*HF_HUB_OFFLINE")
        setenv(name)
    end
    refused("org/never", "fetching is off", { offline = true })
    t.eq(#seen(), mark)
end)

t.test("a connection that always breaks ends in words, and the part stays", function()
    refused("org/dead", "broke off after .*goes on from there")
    t.eq(#clean "org/dead", 1)
    refused("org/shifted", "another part than was asked for")
end)

os.execute(("%s -e 'local w = require(\"lolcats.hub.web\").new{quiet = true} pcall(function() w:run{function() w:ask(\"GET\", \"%s/quit\", {tries = 0}) end} end)'")
    :format(program, endpoint))

t.test("no server: the cache, or an error that says so", function()
    wait_for(function() return not pcall(function() refused("org/never", "xxxx") end) end, 1)
    t.ok(files.is_file(fetched "org/good" .. "/model.safetensors"))
    refused("org/never", "Hugging Face cache.*cannot reach http://127.0.0.1")
    setenv("HF_ENDPOINT", "ftp://x")
    refused("org/never", "HF_ENDPOINT is 'ftp://x'")
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
