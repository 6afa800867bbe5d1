-- checkpoints.lua: PyTorch's, PEFT's and the reference's files: every tensor by its digest, the values beside them, files that
-- must be refused, and the logits of models with such files loaded.
local lc = require "lolcats"
local files = require "lolcats.files"
local ffi = require "ffi"

local function sorted(t)
    local out = {}
    for k in pairs(t) do out[#out + 1] = k end
    table.sort(out)
    return out
end

local function digest(f, name)
    local info = f:info(name)
    local x = f:tensor(name, { dtype = info.dtype or "i32", device = "cpu" })
    if info.dtype then return files.sha256(ffi.string(ffi.cast("const char *", x:data()), x:nbytes())) end
    -- an integer type that no tensor has: its bytes are made again from the values
    local width, bytes = info.bytes / math.max(1, x:numel()), {}
    for i, v in ipairs(x:flatten():totable()) do
        local b = {}
        for k = 1, width do
            b[k] = string.char(v % 256)
            v = math.floor(v / 256)
        end
        bytes[i] = table.concat(b)
    end
    return files.sha256(table.concat(bytes))
end

-- Names as the index says them: a folder of an adapter may be named as PEFT's module tree or as its file has it.
local function tensors_case(c, f, want)
    local n = 0
    for name, e in pairs(want) do
        n = n + 1
        if c.check(name .. " is there", f:has(name)) then
            local info = f:info(name)
            local dtypes = { float32 = "F32", bfloat16 = "BF16", float16 = "F16", float64 = "F64" }
            c.check(name .. " dtype", info.file_dtype == e.dtype or info.file_dtype == dtypes[e.dtype], info.file_dtype)
            c.check(name .. " shape", table.concat(info.shape, ",") == table.concat(e.shape, ","), table.concat(info.shape, ","))
            c.check(name .. " values", lc.scope(digest, f, name) == e.sha256, "sha256 differs")
        end
    end
    return n
end

local function same(got, want)
    if type(want) ~= "table" or want == files.null then return got == want end
    if type(got) ~= "table" then return false end
    for k, v in pairs(want) do
        if not same(got[k], v) then return false, k end
    end
    for k in pairs(got) do
        if want[k] == nil then return false, k end
    end
    return true
end

local function file_case(c, path, want)
    local f = files.open_tensors(path)
    local n = tensors_case(c, f, want.tensors)
    local others = 0
    for _, name in ipairs(f:names()) do
        if not want.tensors[name] and not name:match "^nested_tensors%." then others = others + 1 end
    end
    c.check("no other tensors", others == 0, ("%d of them beside %d"):format(others, n))
    if want.extra then
        local extra = f:meta()
        if extra.extra then extra = extra.extra end -- the key that the file itself has
        local ok, key = same(extra, want.extra)
        c.check("values beside the tensors", ok, tostring(key))
    end
    f:close()
end

local function refuse_case(c, path, what)
    local before = lc.peak_rss()
    local ok, err = pcall(function()
        local f = files.open_tensors(path)
        for _, name in ipairs(f:names()) do lc.scope(function() f:tensor(name) end) end
        f:close()
    end)
    local text = tostring(err)
    c.check("refused", not ok, "it was read without an error")
    c.check("the message names the file", text:find(files.basename(path), 1, true), text)
    local said = type(what) == "table" and what.what or ""
    local called = said:match "calls ([%w_.]+)" or said:match "(os%.system) is called"
    if called and not ok then c.check("the message names " .. called, text:find(called, 1, true), text) end
    c.check("no large allocation", lc.peak_rss() - before < 64e6, ("%.0f MB"):format((lc.peak_rss() - before) / 1e6))
end

return function(dir, T)
    local json = files.read_json(dir .. "/index.json")
    for _, name in ipairs(sorted(json.files)) do
        T.case("checkpoints/" .. name, function(c) file_case(c, dir .. "/" .. name, json.files[name]) end)
    end
    for _, name in ipairs(sorted(json.refuse)) do
        T.case("checkpoints/refuse/" .. name, function(c)
            refuse_case(c, dir .. "/" .. name, type(json.refuse[name]) == "table" and json.refuse[name] or {})
        end)
    end
    dofile(T.here .. "golden/peft.lua")(dir, T)
end
