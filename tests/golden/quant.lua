-- quant.lua: readers of tensor files: dequantised values, metadata of every kind, odd files that are valid, and
-- broken ones that must give an error.
local lc = require "lolcats"
local files = require "lolcats.files"
local ffi = require "ffi"
local bit = require "bit"

local function number_of(v) return type(v) == "string" and tonumber(v) or v end

local function same_value(got, want)
    if type(want) == "table" then
        if type(got) ~= "table" or #got ~= #want then return false end
        for i = 1, #want do
            if not same_value(got[i], want[i]) then return false end
        end
        return true
    end
    if type(want) == "boolean" then return got == want or got == (want and 1 or 0) end
    if type(got) == "number" then -- 64-bit integers are strings in the index; Lua's numbers carry 53 bits of them
        local w = number_of(want)
        return w and math.abs(got - w) <= 1e-15 * math.abs(w)
    end
    return got == want
end

local function raw_digest(x) return files.sha256(ffi.string(ffi.cast("const char *", x:data()), x:nbytes())) end

local function gguf_case(c, path, want, values)
    local f = files.open_tensors(path)
    want = { kv = type(want) == "table" and want.kv or {}, tensors = type(want) == "table" and want.tensors or {} }
    for key, kv in pairs(want.kv) do
        local got = f:meta(key)
        c.check("metadata " .. key, same_value(got, kv.value), tostring(got))
    end
    for _, e in ipairs(want.tensors) do
        if c.check(e.name .. " is there", f:has(e.name)) then
            local info, ne = f:info(e.name), {}
            for i = #e.ne, 1, -1 do ne[#ne + 1] = e.ne[i] end
            c.check(e.name .. " shape", table.concat(info.shape, ",") == table.concat(ne, ","),
                table.concat(info.shape, ","))
            c.check(e.name .. " bytes", info.bytes == e.bytes, tostring(info.bytes))
            c.check(e.name .. " place", info.offset == e.data_offset, tostring(info.offset))
            if info.dtype and e.bytes > 0 then
                local sum = lc.scope(function() return raw_digest(f:tensor(e.name)) end)
                c.check(e.name .. " as stored", sum == e.sha256_bytes, "sha256 differs")
            end
        end
    end
    for _, name in ipairs(f:names()) do
        local expected = values[(name:gsub("^quant%.", ""))]
        if expected and expected:numel() > 0 and f:info(name).dtype then
            c.close(name .. " values", f:tensor(name, { dtype = "f32" }), expected, 1e-6)
        end
    end
    f:close()
end

local function accept_case(c, path, want)
    local f = files.open_tensors(path)
    local n = 0
    for name, list in pairs(want) do
        n = n + 1
        if c.check(name .. " is there", f:has(name)) and f:info(name).dtype then
            local x = f:tensor(name)
            c.check(name .. " size", x:numel() == #list, tostring(x:numel()))
            if #list > 0 then
                local got = x:flatten():totable()
                for i, v in ipairs(list) do c.check(("%s[%d]"):format(name, i - 1), got[i] == v, tostring(got[i])) end
            end
        end
    end
    c.check("number of tensors", #f:names() == n, tostring(#f:names()))
    f:close()
end

-- An error may come when the file is opened or when its tensors are read; silence is what must not be.
local function refuse_case(c, path)
    local before = lc.peak_rss()
    local ok, err = pcall(function()
        local f = files.open_tensors(path)
        for _, name in ipairs(f:names()) do lc.scope(function()
            f:tensor(name, f:info(name).dtype and { dtype = "f32" } or nil) end) end
        f:close()
    end)
    c.check("refused", not ok, "it was read without an error")
    c.check("the message says something", ok or #tostring(err) > 10, tostring(err))
    c.check("no large allocation", lc.peak_rss() - before < 64e6, ("%.0f MB"):format((lc.peak_rss() - before) / 1e6))
end

local function scratch(ending)
    local path = os.tmpname()
    os.remove(path)
    return path .. ending
end

-- Quantised here from the same values: the blocks' bytes are the other writer's.
local function quantise_case(c, T, dir, kind, want)
    local t = T.tensors(dir .. "/dequantised.safetensors")
    local from, to = scratch ".safetensors", scratch ".gguf"
    files.save_tensors(from, { x = t.source })
    local ok, err = pcall(function()
        require("lolcats.convert").convert(from, to, { dtype = kind:lower() })
        local f = files.open_tensors(to)
        c.check("type", f:info("x").file_dtype == kind, f:info("x").file_dtype)
        c.check("bytes", raw_digest(f:tensor "x") == want.sha256_bytes, "sha256 differs")
        f:close()
    end)
    files.remove(from)
    if files.exists(to) then files.remove(to) end
    if not ok then error(err, 0) end
end

-- Special values through the readers' conversions, bit by bit. NaNs need only stay NaNs.
local function special_case(c, T, dir)
    local f = files.open_tensors(dir .. "/dequantised.safetensors")
    local special = f:tensor "special"
    local path = scratch ".safetensors"
    files.save_tensors(path, { bf16 = special, f16 = special })
    local g = files.open_tensors(path)
    for _, dtype in ipairs { "f16", "bf16" } do
        local got = ffi.cast("const uint16_t *", g:tensor(dtype, { dtype = dtype }):data())
        local want = f:tensor("special_" .. dtype .. "_bits", { dtype = "i32" }):totable()
        for i, w in ipairs(want) do
            local v = special:totable()[i]
            c.check(("special[%d] as %s"):format(i - 1, dtype), v ~= v and bit.band(got[i - 1],
                0x7fff) > 0x7c00 or got[i - 1] == w,
                    ("%04x, expected %04x"):format(got[i - 1], w))
        end
    end
    g:close()
    files.remove(path)
    -- all halves: a tensor of every 16-bit pattern, read back as float32
    local all = f:tensor "all_f16_bits_to_f32"
    local bits = {}
    for i = 0, 65535 do bits[i + 1] = string.char(i % 256, math.floor(i / 256)) end
    local head = '{"x":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}}'
    head = head .. (" "):rep(-#head % 8)
    files.write(path, string.char(#head % 256, math.floor(#head / 256)) .. ("\0"):rep(6) .. head ..
        table.concat(bits))
    g = files.open_tensors(path)
    local x = g:tensor("x", { dtype = "f32" })
    local a, b = ffi.cast("const uint32_t *", x:data()), ffi.cast("const uint32_t *", all:contiguous():data())
    local wrong = 0
    for i = 0, 65535 do
        local nan = bit.band(i, 0x7fff) > 0x7c00
        if a[i] ~= b[i] and not (nan and bit.band(a[i], 0x7fffffff) > 0x7f800000) then wrong = wrong + 1 end
    end
    c.check("every half as float32", wrong == 0, wrong .. " differ")
    g:close()
    files.remove(path)
    f:close()
end

return function(dir, T)
    local json = files.read_json(dir .. "/index.json")
    local function names(t)
        local out = {}
        for k in pairs(t) do out[#out + 1] = k end
        table.sort(out)
        return out
    end
    for _, file in ipairs(names(json.gguf)) do
        if files.exists(dir .. "/" .. file) then
            T.case("quant/" .. file, function(c)
                gguf_case(c, dir .. "/" .. file, json.gguf[file], T.tensors(dir .. "/dequantised.safetensors"))
            end)
        end
    end
    for _, e in ipairs(json.types or {}) do
        local all = type(json.gguf["all_types.gguf"]) == "table" and json.gguf["all_types.gguf"].tensors or {}
        for _, want in ipairs(all) do
            if e.how:match "^quantize" and want.name == "quant." .. e.type then
                T.case("quant/quantise " .. e.type, function(c) quantise_case(c, T, dir, e.type, want) end)
            end
        end
    end
    if files.exists(dir .. "/dequantised.safetensors") and T.tensors(dir .. "/dequantised.safetensors").special then
        T.case("quant/special values", function(c) special_case(c, T, dir) end)
    end
    for _, file in ipairs(names(json.accept)) do
        T.case("quant/accept/" .. file, function(c) accept_case(c, dir .. "/accept/" .. file, json.accept[file]) end)
    end
    for _, file in ipairs(names(json.refuse)) do
        T.case("quant/refuse/" .. file, function(c) refuse_case(c, dir .. "/refuse/" .. file) end)
    end
end
