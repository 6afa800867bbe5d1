-- quant.lua: readers of tensor files: dequantised values, metadata of every kind, odd files that are valid, and
-- broken ones that must give an error.
local lc = require "lolcats"
local files = require "lolcats.files"

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
            c.check(e.name .. " shape", table.concat(info.shape, ",") == table.concat(ne, ","), table.concat(info.shape, ","))
            c.check(e.name .. " bytes", info.bytes == e.bytes, tostring(info.bytes))
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
        for _, name in ipairs(f:names()) do lc.scope(function() f:tensor(name, f:info(name).dtype and { dtype = "f32" } or nil) end) end
        f:close()
    end)
    c.check("refused", not ok, "it was read without an error")
    c.check("the message says something", ok or #tostring(err) > 10, tostring(err))
    c.check("no large allocation", lc.peak_rss() - before < 64e6, ("%.0f MB"):format((lc.peak_rss() - before) / 1e6))
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
    for _, file in ipairs(names(json.accept)) do
        T.case("quant/accept/" .. file, function(c) accept_case(c, dir .. "/accept/" .. file, json.accept[file]) end)
    end
    for _, file in ipairs(names(json.refuse)) do
        T.case("quant/refuse/" .. file, function(c) refuse_case(c, dir .. "/refuse/" .. file) end)
    end
end
