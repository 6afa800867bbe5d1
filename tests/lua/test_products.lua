-- test_products.lua: products of a step as modules call them: projections with adapters against the same composed of plain products
-- in float64, gradients that are added in place, adapters that lie side by side, quantised weights, and on a device the products
-- that decoding and training of small models run, against float64 on the CPU.
--   lolcats tests/lua/test_products.lua [device]
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local nn = require "lolcats.nn"
local device = arg and arg[1] or "cpu"
local emulated = device:match "^emulated" ~= nil
local F64 = { dtype = "f64" }

local function randn(shape, std) return lc.randn(shape, F64) * (std or 1) end

-- relative to the largest entry
local function difference(a, b)
    if b:numel() == 0 then return 0 end
    a, b = a:to("cpu"):to("f64"), b:to("cpu"):to("f64")
    local d = (a - b):abs():amax():item() / math.max(b:abs():amax():item(), 1e-30)
    return d == d and d or math.huge
end
local function near(a, b, limit, what)
    local d = difference(a, b)
    if not (d <= limit) then error(("%s: differs by %.3g, allowed %.3g"):format(what or "it", d, limit), 2) end
end

local LIMIT = { f64 = 1e-12, f32 = 2e-5, bf16 = 0.02, f16 = 0.003 }

-- Three projections of one input; ranks[i] 0: no adapter. In dtype, the adapters in `fine`.
local function group(dtype, fine, ranks, outs, inp)
    local list = {}
    for i, out in ipairs(outs) do
        local p = { weight = (randn({ out, inp }, inp ^ -0.5)):to(dtype):to(device) }
        if ranks[i] > 0 then
            p.lora = { a = lc.param((randn({ ranks[i], inp }, inp ^ -0.5)):to(fine):to(device)),
                       b = lc.param(randn({ out, ranks[i] }):to(fine):to(device)), scale = 0.5 * i, on = true }
        end
        list[i] = p
    end
    return list
end

local function exact(x, p, add)
    local function f(v) return v:detach():to("cpu"):to("f64") end
    local y = f(x):matmul(f(p.weight):transpose(1, 2))
    if p.lora then y = y + f(x):matmul(f(p.lora.a):transpose(1, 2)):matmul(f(p.lora.b):transpose(1, 2)) * p.lora.scale end
    return add and y + f(add) or y
end

local function check_group(dtype, fine, ranks, flat, missing, outs, inp)
    outs, inp = outs or { 48, 16, 16 }, inp or 64
    local list = group(dtype, fine, ranks, outs, inp)
    local x = lc.param((randn { 2, 20, inp }):to(dtype):to(device))
    local params = {}
    for _, side in ipairs { "a", "b" } do
        for _, p in ipairs(list) do if p.lora then params[#params + 1] = { name = side, tensor = p.lora[side] } end end
    end
    if flat and #params > 0 then nn.flatten(params) end
    local y, w, total = { nn.project_all(x, list[1], list[2], list[3]) }, {}, nil
    for i = 1, 3 do
        near(y[i], exact(x, list[i]), LIMIT[dtype], "result " .. i)
        w[i] = (randn { 2, 20, outs[i] }):to(dtype):to(device)
        local s = i ~= missing and (y[i] * w[i]):sum()
        total = s and (total and total + s or s) or total
    end
    total:backward()
    local function f(v) return v:detach():to("cpu"):to("f64"):reshape(-1, v:size(-1)) end
    local gx
    for i, p in ipairs(list) do
        if i ~= missing then
            local g, l = f(w[i]), p.lora
            local part = g:matmul(f(p.weight))
            if l then
                local low = g:matmul(f(l.b)) * l.scale
                part = part + low:matmul(f(l.a))
                t.eq(l.a.grad.dtype, fine == "f64" and "f64" or "f32")
                near(l.a.grad, low:transpose(1, 2):matmul(f(x)), LIMIT[dtype], "gradient of a " .. i)
                near(l.b.grad, g:transpose(1, 2):matmul(f(x):matmul(f(l.a):transpose(1, 2))) * l.scale, LIMIT[dtype], "gradient of b " .. i)
            end
            gx = gx and gx + part or part
        end
    end
    near(x.grad, gx:reshape(2, 20, inp), LIMIT[dtype], "gradient of x")
    if flat and not missing then -- a second time: everything twice
        local once = {}
        for i, p in ipairs(params) do once[i] = p.tensor.grad:clone() end
        total = nil
        for i, r in ipairs { nn.project_all(x, list[1], list[2], list[3]) } do
            local s = (r * w[i]):sum()
            total = total and total + s or s
        end
        total:backward()
        for i, p in ipairs(params) do near(p.tensor.grad, once[i] * 2, 1e-5, "twice " .. i) end
    end
end

local pairs_of_dtypes = { { "f64", "f64" }, { "f32", "f32" }, { "bf16", "f32" }, { "f16", "f32" } }
if device == "cpu" then pairs_of_dtypes[5] = { "bf16", "bf16" } end
for _, d in ipairs(pairs_of_dtypes) do
    t.test(("projections in %s with adapters in %s"):format(d[1], d[2]), function()
        check_group(d[1], d[2], { 8, 8, 8 })
        check_group(d[1], d[2], { 8, 0, 4 })
        check_group(d[1], d[2], { 8, 4, 4 }, true)
        check_group(d[1], d[2], { 0, 0, 0 })
        check_group(d[1], d[2], { 4, 8, 4 }, false, 2)
        check_group(d[1], d[2], { 4, 4, 4 }, true, 1)
    end)
    t.test(("adapters in %s beside %s, of sizes that kernels of their own take"):format(d[2], d[1]), function()
        check_group(d[1], d[2], { 8, 8, 8 }, true, nil, { 64, 32, 96 }, 160)
        check_group(d[1], d[2], { 8, 16, 8 }, true, nil, { 32, 32, 64 }, 96)
        check_group(d[1], d[2], { 8, 0, 8 }, true, nil, { 32, 32, 64 }, 96)
        check_group(d[1], d[2], { 0, 0, 16 }, true, nil, { 32, 32, 64 }, 32)
        check_group(d[1], d[2], { 16, 16, 16 }, true, 3, { 64, 32, 32 }, 64)
        check_group(d[1], d[2], { 8, 24, 8 }, true, nil, { 64, 32, 32 }, 64) -- five tiles of ranks: as before
        check_group(d[1], d[2], { 8, 8, 8 }, false, nil, { 64, 32, 32 }, 64)
        if not emulated and device ~= "cpu" then check_group(d[1], d[2], { 8, 8, 8 }, true, nil, { 4096, 1024, 1024 }, 4096) end
    end)
end

t.test("one projection with an adapter and a residual", function()
    local p = group("bf16", "f32", { 8 }, { 64 }, 96)[1]
    local x, add = randn({ 50, 96 }):to("bf16"):to(device), lc.param(randn({ 50, 64 }):to("bf16"):to(device))
    near(nn.project(x, p, add), exact(x, p, add), LIMIT.bf16)
    p = group("f32", "f32", { 4 }, { 24 }, 32)[1]
    x, add = randn({ 5, 32 }):to("f32"):to(device), lc.param(randn({ 5, 24 }):to("f32"):to(device))
    local y = nn.project(x, p, add)
    near(y, exact(x, p, add), LIMIT.f32)
    y:sum():backward()
    near(add.grad, lc.ones({ 5, 24 }, F64), 1e-6)
    near(p.lora.a.grad, (lc.ones({ 5, 24 }, F64):matmul(p.lora.b:detach():to("cpu"):to("f64")) * 0.5):transpose(1, 2)
        :matmul(x:to("cpu"):to("f64")), LIMIT.f32)
    p.lora.on = false
    near(nn.project(x, p), x:to("cpu"):to("f64"):matmul(p.weight:to("cpu"):to("f64"):transpose(1, 2)), LIMIT.f32)
end)

t.test("projections that do not fit are told", function()
    local x, w = lc.randn({ 3, 8 }), lc.randn({ 4, 8 })
    t.errors(function() lc.projections(x, lc.randn { 4, 7 }) end, "w must be a matrix")
    t.errors(function() lc.projections(x, w, { a = lc.randn { 2, 8 } }) end, "an adapter is a pair")
    t.errors(function() lc.projections(x, w, { a = lc.randn { 2, 8 }, b = lc.randn { 4, 3 } }) end, "an adapter must be")
    t.errors(function() lc.projections(x, w, { add = lc.randn { 3, 5 } }) end, "add must have")
end)

t.test("a weight's gradient is added to what it has, in f32 for halves", function()
    local w, x = lc.param(randn({ 12, 40 }):to("f32"):to(device)), randn({ 6, 40 }):to("bf16"):to(device)
    local function step() lc.linear(x, w):sum():backward() end
    step()
    t.eq(w.grad.dtype, "f32")
    local once = w.grad:clone()
    near(once, lc.ones({ 12, 6 }, F64):matmul(x:to("cpu"):to("f64")), 1e-5)
    step()
    near(w.grad, once * 2, 1e-6)
end)

-- ---- few rows, odd shapes, every weight dtype -----------------------------------------------------------------------------
t.test("few rows of every dtype against weights of every dtype", function()
    local shapes = emulated and { { 1, 40, 64 }, { 3, 9, 512 }, { 8, 5, 96 } }
        or { { 1, 4096, 4096 }, { 1, 33, 4096 }, { 1, 5000, 64 }, { 1, 70, 8 }, { 2, 640, 512 }, { 7, 96, 2080 }, { 8, 128, 256 }, { 9, 64, 64 }, { 3, 17, 33 } }
    for _, s in ipairs(shapes) do
        local x64, w64, b64, add64 = randn { s[1], s[3] }, randn({ s[2], s[3] }, s[3] ^ -0.5), randn { s[2] }, randn { s[1], s[2] }
        for _, xt in ipairs { "f32", "bf16", "f16" } do
            for _, wt in ipairs { "f32", "bf16", "f16" } do
                local x, w, b, add = x64:to(xt):to(device), w64:to(wt):to(device), b64:to(xt):to(device), add64:to(xt):to(device)
                local function f(v) return v:to("cpu"):to("f64") end
                local want = f(x):matmul(f(w):transpose(1, 2))
                near(lc.linear(x, w), want, LIMIT[xt], ("%s x %s, %d rows [%d, %d]"):format(xt, wt, s[1], s[2], s[3]))
                near(lc.linear(x, w, b, add, 0.5), want * 0.5 + f(b) + f(add), LIMIT[xt], "with bias and add")
            end
        end
    end
end)

t.test("one row of halves: rows in pieces of odd numbers, more tiles than a block holds sums for", function()
    if device == "cpu" then return end
    local shapes = emulated and { { 45, 3200 }, { 2200, 1536 } }
        or { { 4096, 4096 }, { 6144, 4096 }, { 14339, 4096 }, { 4096, 14336 }, { 68001, 2048 }, { 1030, 5632 }, { 2049, 24576 } }
    for _, s in ipairs(shapes) do
        for _, dtype in ipairs { "bf16", "f16" } do
            local where = { dtype = dtype, device = device }
            local x, w = lc.randn({ 1, s[2] }, where), lc.randn({ s[1], s[2] }, where)
            local b, add = lc.randn({ s[1] }, where), lc.randn({ 1, s[1] }, where)
            local got = lc.linear(x, w, b, add, 0.5)
            local old = lc.set_option("plain_linear", true)
            local want = lc.linear(x, w, b, add, 0.5)
            lc.set_option("plain_linear", old)
            near(got, want, LIMIT[dtype], ("%s [%d, %d]"):format(dtype, s[1], s[2]))
            if emulated and s[1] > 1000 then break end
        end
    end
end)

-- A GGUF file of random blocks with moderate scales: its type, elements and bytes a block, where the block's halves stand.
local QUANTS = { { 2, 32, 18, { 0 } }, { 3, 32, 20, { 0, 2 } }, { 6, 32, 22, { 0 } }, { 7, 32, 24, { 0, 2 } }, { 8, 32, 34, { 0 } },
                 { 10, 256, 84, { 80, 82 } }, { 11, 256, 110, { 108 } }, { 12, 256, 144, { 0, 2 } }, { 13, 256, 176, { 0, 2 } },
                 { 14, 256, 210, { 208 } }, { 20, 32, 18, { 0 } } }
local ROWS, COLUMNS = 24, 1024

local function write_quants(path)
    local ffi = require "ffi"
    local function int(c, v) return ffi.string(ffi.new(c .. "[1]", v), ffi.sizeof(c)) end
    local function str(v) return int("uint64_t", #v) .. v end
    local function pad(v) return v .. ("\0"):rep(-#v % 32) end
    local head = { "GGUF", int("uint32_t", 3), int("uint64_t", #QUANTS), int("uint64_t", 0) }
    local data, at, state = {}, 0, 12345
    for k, q in ipairs(QUANTS) do
        local blocks, n = {}, q[3]
        for i = 1, ROWS * COLUMNS / q[2] do
            local bytes = {}
            for j = 1, n do
                state = (state * 1103515245 + 12345) % 2 ^ 31
                bytes[j] = math.floor(state / 2 ^ 16) % 256
            end
            for _, h in ipairs(q[4]) do bytes[h + 1], bytes[h + 2] = bytes[h + 1], 0x20 + bytes[h + 2] % 4 end -- 0.008 to 0.03
            blocks[i] = string.char(unpack(bytes))
        end
        head[#head + 1] = str("t" .. k) .. int("uint32_t", 2) .. int("uint64_t", COLUMNS) .. int("uint64_t", ROWS) .. int("uint32_t", q[1])
            .. int("uint64_t", at)
        data[k] = pad(table.concat(blocks))
        at = at + #data[k]
    end
    local file = assert(io.open(path, "wb"))
    file:write(pad(table.concat(head)), table.concat(data))
    file:close()
end

t.test("quantised weights, few rows and many", function()
    local path = os.tmpname()
    write_quants(path)
    local f = require("lolcats.files").open_tensors(path)
    for k in ipairs(QUANTS) do
        local w = f:tensor("t" .. k, { device = "cpu" })
        local wide, there = w:to("f32"):to("f64"):transpose(1, 2), w:to(device)
        for _, rows in ipairs(emulated and { 1, 3, 9 } or { 1, 3, 8, 20 }) do
            for _, xt in ipairs { "f32", "bf16", "f16" } do
                local x = randn({ rows, COLUMNS }):to(xt)
                near(lc.linear(x:to(device), there), x:to("f64"):matmul(wide), LIMIT[xt], ("%s, %d rows of %s"):format(w.dtype, rows, xt))
            end
        end
        local x = lc.param((randn { 5, COLUMNS }):to("f32"):to(device)) -- a frozen quantised weight passes gradients on
        nn.project_all(x, { weight = there }, { weight = there }):sum():backward()
        near(x.grad, lc.ones({ 5, ROWS }, F64):matmul(wide:transpose(1, 2)), LIMIT.f32, w.dtype .. ", gradient of x")
    end
    f:close()
    os.remove(path)
end)

-- ---- layouts --------------------------------------------------------------------------------------------------------------
t.test("products of transposed, sliced, broadcast and expanded operands", function()
    for _, dtype in ipairs { "f32", "bf16", "f16", "f64" } do
        local function put(v) return v:to(dtype):to(device) end
        local function check(a, b, add, alpha)
            local function f(v) return v:to("cpu"):to("f64") end
            local want = f(a):matmul(f(b)) * (alpha or 1)
            near(a:matmul(b, add, alpha), add and want + f(add) or want, LIMIT[dtype], dtype)
        end
        local a, b = put(randn { 2, 3, 24, 16 }), put(randn { 2, 3, 16, 40 })
        check(a, b)
        check(a, b, put(randn { 24, 40 }), 0.5)
        check(a, b, put(randn { 40 }))
        check(a, b, put(randn { 2, 1, 24, 1 }))
        check(a:transpose(-1, -2):contiguous():transpose(-1, -2), b:transpose(-1, -2):contiguous():transpose(-1, -2))
        check(put(randn { 2, 24, 3, 16 }):transpose(2, 3), b)                      -- heads side by side
        check(put(randn { 2, 24, 3, 16 }):transpose(2, 3), put(randn { 2, 40, 3, 16 }):permute(1, 3, 4, 2))
        check(a, put(randn { 16, 40 }))                                           -- one b for all
        check(put(randn { 24, 16 }), b)                                           -- one a for all
        check(put(randn { 2, 1, 24, 16 }):expand(2, 3, 24, 16), b)
        check(put(randn { 24, 32 }):slice(2, 3, 18), put(randn { 20, 40 }):slice(1, 2, 17))
        check(put(randn { 24, 32 }):slice(2, 1, 32, 2), put(randn { 16, 40 }))
        check(put(randn { 1, 16 }):expand(24, 16), put(randn { 16, 1 }):expand(16, 40))
        check(put(randn { 1, 70 }), put(randn { 70, 33 }))
        check(put(randn { 70, 33 }), put(randn { 33, 1 }))
        check(put(randn { 5 }), put(randn { 5, 3 }))
    end
end)

-- ---- a sweep of odd sizes: what cuBLASLt picks against the plain kernel ---------------------------------------------------------
t.test("a sweep of sizes, fast and plain", function()
    local sizes = emulated and { { 17, 9, 33 } }
        or { { 1, 1, 1 }, { 1, 1024, 64 }, { 17, 9, 33 }, { 64, 64, 64 }, { 127, 129, 65 }, { 128, 24, 4096 }, { 24, 4096, 128 }, { 256, 8, 1024 },
             { 8, 256, 1024 }, { 300, 4096, 8 }, { 512, 512, 512 }, { 33, 1000, 512 } }
    for _, s in ipairs(sizes) do
        local a64, b64 = randn { s[1], s[3] }, randn({ s[3], s[2] }, s[3] ^ -0.5)
        for _, dtype in ipairs { "f32", "bf16", "f16", "f64" } do
            local a, b = a64:to(dtype):to(device), b64:to(dtype):to(device)
            local want = a:to("cpu"):to("f64"):matmul(b:to("cpu"):to("f64"))
            local name = ("%s [%d, %d] k %d"):format(dtype, s[1], s[2], s[3])
            local bt = b:transpose(1, 2):contiguous():transpose(1, 2)
            local at = a:transpose(1, 2):contiguous():transpose(1, 2)
            for _, p in ipairs { { a, b }, { a, bt }, { at, b }, { at, bt } } do near(p[1]:matmul(p[2]), want, LIMIT[dtype], name) end
            near(a:matmul(b, nil, 1, true), want, dtype == "f64" and 1e-12 or 2e-5, name .. " wide")
            lc.set_option("plain_linear", 1)
            near(a:matmul(b), want, LIMIT[dtype], name .. " plain")
            lc.set_option("plain_linear", 0)
        end
    end
end)

t.finish()
