-- golden.lua: runs every case in a folder of golden values, in float32 and in float64, and says how many passed.
-- Nothing about the cases is known here but the layout: another folder with other cases of the same kinds works
-- alike.
--   lolcats tests/golden.lua [DIR] [--only kind,kind] [--all] [--verbose] [--set plain_hybrid] [--device cuda:0]
local lc = require "lolcats"
local files = require "lolcats.files"

local here = debug.getinfo(1, "S").source:match "^@(.*)golden%.lua$" or "tests/"

local SLOW = { quality = "takes long; add --all or --only quality" }
local ORDER = { "attention", "model", "models", "optim", "tokenizer", "chat_template", "data", "eval", "quant",
                "checkpoints", "compat",
                "quality" }

local function parse(argv)
    local o = { only = nil }
    local i = 1
    while argv[i] do
        local a = argv[i]
        if a == "--all" then o.all = true
        elseif a == "--verbose" or a == "-v" then o.verbose = true
        elseif a == "--device" then -- float32 there; float64 too, where the device has it
            i = i + 1
            lc.default_device(argv[i] or "")
        elseif a == "--set" then -- a switch of runtime/core/options.c: run on a fast path's plain twin
            i = i + 1
            lc.set_option(argv[i] or "", 1)
        elseif a == "--only" then
            i = i + 1
            o.only = {}
            for k in (argv[i] or ""):gmatch "[^,]+" do o.only[k] = true end
        elseif a:sub(1, 2) == "--" then
            io.stderr:write("golden.lua: unknown option " .. a .. "\n")
            os.exit(2)
        else o.dir = a end
        i = i + 1
    end
    o.named = o.dir ~= nil
    o.dir = (o.dir or (os.getenv "LOLCATS_TEST_DATA" or here .. "../../shared") .. "/golden"):gsub("(.)/+$", "%1")
    return o
end

local T = { passed = 0, failed = 0, skipped = 0, loosened = 0 }
local opts = parse(arg or {})
T.dir, T.here = opts.dir, here

function T.skip(name, why)
    T.skipped = T.skipped + 1
    if opts.verbose then print(("skip  %s (%s)"):format(name, why)) end
end

--- Runs one case. f gets a checker: check(label, ok, detail) and close(label, got, want, tolerance).
function T.case(name, f)
    local problems, worst = {}, 0
    local c = {}
    function c.check(label, ok, detail)
        if not ok then problems[#problems + 1] = label .. (detail and (": " .. detail) or "") end
        return ok
    end
    function c.skip(why) error({ skip = why }, 0) end
    --- Largest difference of two tensors against rel * largest entry of want, at least `floor`.
    function c.close(label, got, want, rel, floor)
        local d, top, bad = lc.no_grad(lc.scope, T.difference, got, want)
        if bad then return c.check(label, false, bad) end
        local limit = math.max(rel * top, floor or 0)
        worst = math.max(worst, d / limit)
        return c.check(label, d <= limit, ("differs by %.3g, allowed %.3g (largest entry %.3g)"):format(d, limit, top))
    end
    function c.near(label, got, want, limit)
        worst = math.max(worst, math.abs(got - want) / limit)
        return c.check(label, math.abs(got - want) <= limit,
                       ("%.9g, expected %.9g within %.3g"):format(got, want, limit))
    end
    local t0 = lc.now()
    local ok, err = xpcall(function() return lc.scope(f, c) end, function(e)
        if type(e) == "table" and e.skip then return e end
        return tostring(e) .. (opts.verbose and "\n" .. debug.traceback("", 2) or "")
    end)
    if not ok and type(err) == "table" and err.skip then return T.skip(name, err.skip) end
    if not ok then problems[#problems + 1] = err end
    if #problems == 0 then
        T.passed = T.passed + 1
        if opts.verbose then print(("pass  %-60s %.2f of the tolerance, %.2f s"):format(name, worst, lc.now() - t0)) end
    else
        T.failed = T.failed + 1
        print("FAIL  " .. name)
        for i = 1, math.min(#problems, opts.verbose and 40 or 5) do print("      " .. problems[i]) end
        if #problems > 5 and not opts.verbose then print(("      and %d more"):format(#problems - 5)) end
    end
    collectgarbage()
end

-- Float32 has cases in which no engine can meet a tolerance: a feature at the kink of its ReLU, or a gradient within
-- rounding of 0 whose sign AdamW's first step turns into a whole step. How much that is, float64 tells: the same case
-- with its inputs moved by about float32's rounding.
local TRIES, NOISE, MARGIN = 24, 2 ^ -22, 4 -- not the inputs alone are rounded: every op on the way is

--- Runs f(c, "f32", tolerances), or the same in f64. A comparison that misses in float32 is held against what float32's
--- rounding of the inputs does to the float64 result: f(c, "f64", tolerances, noise), where noise(x) moves a tensor by
--- that much.
function T.dtype_case(name, dtype, f)
    T.case(name .. " " .. dtype, function(c)
        if dtype == "f64" then return f(c, dtype, T.TOL.f64) end
        local missed, probe = {}, setmetatable({}, { __index = c })
        function probe.close(label, got, want, rel, floor)
            local d, top, bad = lc.no_grad(lc.scope, T.difference, got, want)
            if bad or d > math.max(rel * top, floor or 0) then
                missed[#missed + 1] = { label, d, rel, top, floor, bad }
            else
                c.close(label, got, want, rel, floor)
            end
        end
        f(probe, dtype, T.TOL.f32)
        if #missed == 0 then return end
        local cost, measure = {}, setmetatable({}, { __index = c })
        function measure.close(label, got, want)
            local d = lc.no_grad(lc.scope, T.difference, got, want)
            cost[label] = math.max(cost[label] or 0, d)
        end
        local function noise(x) return x * (lc.rand(x.shape, { dtype = "f64" }) * (2 * NOISE) + (1 - NOISE)) end
        local function covered()
            for _, m in ipairs(missed) do
                if m[6] or m[2] > MARGIN * (cost[m[1]] or 0) then return false end
            end
            return true
        end
        for try = 1, TRIES do
            lc.manual_seed(try)
            lc.scope(f, measure, "f64", T.TOL.f64, noise)
            if covered() then break end
        end
        for _, m in ipairs(missed) do
            local label, d, rel, top, floor, bad = unpack(m, 1, 6)
            local limit = math.max(rel * top, floor or 0)
            local spread = MARGIN * (cost[label] or 0)
            T.loosened = T.loosened + (d <= spread and not bad and 1 or 0)
            c.check(label, not bad and d <= spread, bad or
                ("differs by %.3g, allowed %.3g (largest entry %.3g; rounding the inputs costs %.3g)")
                    :format(d, limit, top, spread))
        end
    end)
end

--- Largest absolute difference and largest absolute entry of want; a third result says why they cannot be compared.
function T.difference(got, want)
    if type(got) == "number" then got = lc.tensor({ got }, { dtype = "f64", device = "cpu" }) end
    if type(want) == "number" then want = lc.tensor({ want }, { dtype = "f64", device = "cpu" }) end
    got, want = got:detach():cpu():to("f64"), want:detach():cpu():to("f64")
    if got:numel() ~= want:numel() then
        return 0, 0, ("shape [%s], expected [%s]"):format(table.concat(got.shape, ", "), table.concat(want.shape, ", "))
    end
    if got:numel() == 0 then return 0, 0 end
    got, want = got:reshape(-1), want:reshape(-1)
    if lc.count_nonfinite(got):item() > 0 then return 0, 0, "has NaN or infinity" end
    return (got - want):abs():amax():item(), want:abs():amax():item()
end

--- All tensors of a safetensors file whose dtype a tensor can have, by name, alive until the case ends.
function T.tensors(path)
    local f = files.open_tensors(path)
    local out = {}
    for _, name in ipairs(f:names()) do
        if f:info(name).dtype then out[name] = f:tensor(name) end
    end
    f:close()
    return out
end

--- A path of an index file, which counts from the folder that holds the shared one; nil when it is not there.
function T.data(path)
    local env = os.getenv "LOLCATS_TEST_DATA"
    local tail = path:gsub("^shared/", "")
    for _, p in ipairs { T.dir .. "/../../" .. path, T.dir .. "/../" .. tail, env and env .. "/" .. tail or "",
                         here .. "../../shared/" .. tail } do
        if p ~= "" and files.exists(p) then return p end
    end
end

-- What issue and index files allow, by dtype.
T.DTYPES = { "f32", "f64" }
T.TOL = {
    f32 = { out = 1e-5, grad = 1e-4, loss = 1e-5, final = 1e-4, floor = 1e-6 },
    f64 = { out = 1e-9, grad = 1e-9, loss = 1e-9, final = 1e-9, floor = 1e-10 },
}

if not opts.named and not files.is_dir(opts.dir) then
    print("skipped: no reference cases in " .. opts.dir .. " (LOLCATS_TEST_DATA names the folder of real data)")
    os.exit(77)
end
if not files.is_dir(opts.dir) then
    io.stderr:write("golden.lua: there is no folder " .. opts.dir .. "\n")
    os.exit(2)
end
local kinds = {}
for _, name in ipairs(ORDER) do
    if files.is_dir(opts.dir .. "/" .. name) then kinds[#kinds + 1] = name end
end
for _, name in ipairs(files.list(opts.dir)) do
    local known = false
    for _, k in ipairs(ORDER) do known = known or k == name end
    if not known and files.is_dir(opts.dir .. "/" .. name) then kinds[#kinds + 1] = name end
end
if #kinds == 0 then
    io.stderr:write("golden.lua: no folder of cases in " .. opts.dir .. "\n")
    os.exit(2)
end

for _, kind in ipairs(kinds) do
    local path = here .. "golden/" .. kind .. ".lua"
    if opts.only and not opts.only[kind] then
        -- not asked for
    elseif not files.exists(path) then
        print(("skip  %s: not built yet"):format(kind))
        T.skipped = T.skipped + 1
    elseif SLOW[kind] and not opts.all and not opts.only then
        print(("skip  %s: %s"):format(kind, SLOW[kind]))
        T.skipped = T.skipped + 1
    else
        local before = { T.passed, T.failed, T.skipped }
        local t0 = lc.now()
        local ok, err = xpcall(function() dofile(path)(opts.dir .. "/" .. kind, T) end, function(e)
            return tostring(e) .. "\n" .. debug.traceback("", 2)
        end)
        if not ok then
            T.failed = T.failed + 1
            print("FAIL  " .. kind .. ": " .. err)
        end
        print(("%-14s %d passed, %d failed, %d skipped, %.1f s"):format(kind, T.passed - before[1],
            T.failed - before[2],
                                                                     T.skipped - before[3], lc.now() - t0))
    end
end
if T.loosened > 0 then
    print(("%d float32 comparisons were held to what rounding their inputs costs"):format(T.loosened))
end
print(("%d passed, %d failed, %d skipped"):format(T.passed, T.failed, T.skipped))
os.exit(T.failed == 0 and 0 or 1)
