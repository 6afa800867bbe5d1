-- inspect.lua: what a file of tensors holds.
local lc = require "lolcats"
local files = require "lolcats.files"

local args = lc.args {
    "Lists tensors, dtypes, shapes, sizes and metadata of a safetensors, PyTorch or GGUF file, or of a folder with " ..
    "one, with shards or with a distributed checkpoint. Nothing is run and nothing is read but headers.",
    { "file", lc.required, "a file or folder", positional = true },
    { "json", false, "one JSON object instead of text" },
}

local about = require("lolcats.convert").inspect(args.file)

-- JSON has no NaN; a hostile checkpoint may.
local function printable(v)
    if type(v) == "number" and (v ~= v or v == math.huge or v == -math.huge) then return tostring(v) end
    if type(v) ~= "table" or v == files.null then return v end
    for k, x in pairs(v) do v[k] = printable(x) end
    return v
end

if args.json then
    print(files.to_json(printable(about)))
    return
end

local function size(n)
    local units = { "bytes", "KB", "MB", "GB", "TB" }
    local u = 1
    while n >= 1000 and u < #units do n, u = n / 1000, u + 1 end
    return u == 1 and ("%d bytes"):format(n) or ("%.2f %s"):format(n, units[u])
end

-- Control characters would reach the terminal.
local function clean(s) return (s:gsub("[%c\127]", "?")) end

local function show(v)
    if type(v) == "string" then
        local s = clean(v)
        return #s > 100 and s:sub(1, 100):gsub("[\128-\191]*$", "") .. (" .. (%d bytes)"):format(#v) or s
    end
    if type(v) == "table" and v ~= files.null then
        local s = files.to_json(printable(v))
        return #s > 100 and s:sub(1, 100):gsub("[\128-\191]*$", "") .. " .." or s
    end
    return type(v) == "number" and ("%.15g"):format(v) or tostring(v)
end

print(("%s: %s, %d tensors, %.0f values, %s"):format(args.file, about.format, about.count, about.elements,
    size(about.bytes)))
local keys = {}
for k in pairs(about.metadata) do keys[#keys + 1] = tostring(k) end
table.sort(keys)
if #keys > 0 then print "\nmetadata" end
for _, k in ipairs(keys) do print(("  %s = %s"):format(clean(k), show(about.metadata[k]))) end
local widest, dtype = 4, 5
for _, e in ipairs(about.tensors) do widest, dtype = math.max(widest, #e.name), math.max(dtype, #e.dtype) end
widest = math.min(widest, 90)
if about.count > 0 then print "\ntensors" end
for _, e in ipairs(about.tensors) do
    print(("  %-" .. widest .. "s  %-" .. dtype .. "s  %-20s %s%s"):format(clean(e.name), e.dtype,
        "[" .. table.concat(e.shape, ", ") .. "]",
        size(e.bytes), e.file and "  " .. e.file or ""))
end
