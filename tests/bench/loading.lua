-- loading.lua: what it costs to load: the 135M GGUF ready to run, a large safetensors file mapped, converted to
-- f32, and converted to another file; seconds, rates and peak memory. Each in a process of its own, for its own
-- peak.
--   lolcats tests/bench/loading.lua [GB]
local lc = require "lolcats"
local files = require "lolcats.files"

local step, path, program = arg[1], arg[2], os.getenv "LOLCATS_PROGRAM" or "/proc/self/exe"

local function gb(n) return ("%.2f GB"):format(n / 1e9) end

-- Pages of mapped files count in the peak; what the process itself holds is RssAnon.
local function anonymous() return tonumber((files.read "/proc/self/status"):match "RssAnon:%s*(%d+)") * 1024 end

local steps = {}

function steps.map()
    local t0 = lc.now()
    local f = files.open_tensors(path)
    local opened = lc.now() - t0
    local n = #f:names()
    print(("mapped: %d tensors in %.1f ms, peak %s"):format(n, opened * 1e3, gb(lc.peak_rss())))
end

function steps.f32()
    local f, bytes, before = files.open_tensors(path), 0, lc.peak_rss()
    local t0, all = lc.now(), {}
    for _, name in ipairs(f:names()) do
        all[#all + 1] = f:tensor(name, { dtype = "f32" })
        bytes = bytes + all[#all]:nbytes()
    end
    local s = lc.now() - t0
    print(("as f32: %s in %.2f s (%.2f GB/s), peak %s, before it %s"):format(gb(bytes), s, bytes / s / 1e9,
        gb(lc.peak_rss()), gb(before)))
end

function steps.convert()
    local t0 = lc.now()
    require("lolcats.convert").convert(path, path .. ".pt", { dtype = "f16" })
    print(("to .pt in f16: %.2f s, peak %s, of that not files %s"):format(lc.now() - t0, gb(lc.peak_rss()),
        gb(anonymous())))
    files.remove(path .. ".pt")
end

function steps.gguf()
    local t0 = lc.now()
    local model = lc.load "smollm2"
    print(("135M GGUF to f32, with its tokenizer: %.3f s, peak %s"):format(lc.now() - t0, gb(lc.peak_rss())))
    model:logits { { 1, 2, 3 } }
    print(("  and its first logits: %.3f s"):format(lc.now() - t0))
end

if steps[step] then return steps[step]() end

local size = tonumber(step) or 2
local folder = os.getenv "TMPDIR" or "/tmp"
path = folder .. "/lolcats-loading-" .. tostring(os.time()) .. ".safetensors"
local list, x = {}, lc.randn(8192, 2048):to "bf16"
for i = 1, math.floor(size * 1e9 / x:nbytes()) do list[i] = { name = ("w.%03d"):format(i), tensor = x } end
local t0 = lc.now()
files.save_tensors(path, list)
print(("written: %s of bf16 in %.2f s"):format(gb(#list * x:nbytes()), lc.now() - t0))
for _, name in ipairs { "gguf", "gguf", "map", "f32", "convert" } do
    os.execute(("%s %s %s %s"):format(program == "/proc/self/exe" and
        files.read("/proc/self/cmdline"):match "^[^%z]+" or program,
                                      debug.getinfo(1, "S").source:sub(2), name, path))
end
files.remove(path)
