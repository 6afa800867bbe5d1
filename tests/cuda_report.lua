-- cuda_report.lua: runs every test that takes a device, and the benchmarks of single ops, on a GPU, and writes what came out as one
-- Markdown file: device, driver, commit; passed and failed; per op the worst error, time and rate.
--   lolcats tests/cuda_report.lua [--device cuda:0] [--out tests/cuda_report.md] [--commit HASH]
local lc = require "lolcats"
local files = lc.files
local program = require "lolcats.program"

local args = lc.args {
    "Test a GPU and write a report.",
    { "device", "cuda:0", "where" },
    { "out", "tests/cuda_report.md", "the report" },
    { "commit", "", "what was built; by default what git says" },
    { "golden", "", "folder of golden cases; by default where the tests look" },
    { "bench", true, "also time the ops" },
}
local device = args.device
local tmp = os.tmpname()

local function capture(command)
    local ok = os.execute(("%s >%s 2>&1"):format(command, tmp)) == 0
    local text = files.read(tmp)
    os.remove(tmp)
    return ok, text
end
local function run(script, more)
    return capture(("LOLCATS_DEVICE=%s '%s' %s %s"):format(device, program.path, script, more or ""))
end

local function describe()
    for _, d in ipairs(lc.devices()) do
        if d.name == device then return d.describe end
    end
end
if not lc.has_device(device) then lc.fail("no device %s: %s", device, lc.plugin_why(device:match "^%a+") or "") end
local commit = args.commit
if commit == "" then
    local ok, text = capture "git rev-parse --short HEAD"
    commit = ok and text:match "%x+" or "unknown"
end
local _, driver = capture "cat /proc/driver/nvidia/version 2>/dev/null | head -1"
local out = {
    "# The op table on a GPU", "",
    "Written by `lolcats tests/cuda_report.lua`.", "",
    ("- device: %s"):format(describe()),
    ("- driver: %s"):format(driver:match "(%d+%.%d+[%.%d]*)" or "unknown"),
    ("- commit: %s, lolcats %s"):format(commit, lc.version),
    ("- date: %s"):format(os.date "!%Y-%m-%d"), "",
}
local function put(...) out[#out + 1] = (...):format(select(2, ...)) end

-- ---- tests ----------------------------------------------------------------------------------------------------------
local failed = 0
put("## Tests")
put("")
put("| test | result |")
put("|---|---|")
local function test(name, script, more)
    io.stderr:write(name, "\n")
    local ok, text = run(script, more)
    local last = text:match "([^\n]*passed[^\n]*)\n?$" or text:match "([^\n]+)\n?$" or "no output"
    if not ok then
        failed = failed + 1
        io.stderr:write(text:sub(-3000), "\n")
    end
    put("| `%s %s` | %s%s |", script, (more or ""):gsub("%s+%-%-json%s+%S+", ""), ok and "" or "FAILED: ", (last:gsub("|", "/")))
end
local errors = os.tmpname()
test("op table", "tests/ops.lua", ("--device %s --json %s"):format(device, errors))
test("rows", "tests/ops/rows.lua", "--device " .. device)
test("elementwise", "tests/device_elementwise.lua", "--device " .. device)
test("products", "tests/lua/test_products.lua", device)
for _, name in ipairs { "hybrid", "hybrid_backward", "attention" } do
    local script = ("tests/lua/test_cuda_%s.lua"):format(name)
    if files.exists(script) then test(name, script) end
end
test("golden", "tests/golden.lua", ("%s --device %s --only attention,model,optim"):format(args.golden, device))

-- ---- ops ------------------------------------------------------------------------------------------------------------
local ok, worst = pcall(files.read_json, errors)
os.remove(errors)
if ok then
    put("")
    put("## Worst error of each op")
    put("")
    put("Largest difference from the CPU's float64 result, relative to its largest entry, over all samples of the op table's tests,")
    put("gradients included; in brackets what the tests allow.")
    put("")
    put("| op | f32 | bf16 | f16 |")
    put("|---|---|---|---|")
    local names = {}
    for name in pairs(worst) do names[#names + 1] = name end
    table.sort(names)
    local function cell(w) return w and ("%.1e (%.0e)"):format(w.error, w.limit) or "-" end
    for _, name in ipairs(names) do
        local w = worst[name]
        put("| %s | %s | %s | %s |", name, cell(w.f32), cell(w.bf16), cell(w.f16))
    end
end

-- ---- speed ----------------------------------------------------------------------------------------------------------
local function bench(title, script, more)
    io.stderr:write(title, "\n")
    local fine, text = run(script, ("--device %s %s"):format(device, more or ""))
    put("")
    put("## %s", title)
    put("")
    put("`lolcats %s %s`", script, more or "")
    put("")
    out[#out + 1] = "```\n" .. text:gsub("%s+$", "") .. "\n```"
    if not fine then failed = failed + 1 end
end
if args.bench then
    bench("Elementwise", "tests/bench/pointwise_gpu.lua")
    bench("Rows", "tests/bench/rows_gpu.lua")
    bench("Products", "tests/bench/gpu_gemm.lua")
    bench("Attention", "tests/bench/attention_gpu.lua")
end
files.write(args.out, table.concat(out, "\n") .. "\n")
print(("%s: %d failed"):format(args.out, failed))
if failed > 0 then os.exit(1) end
