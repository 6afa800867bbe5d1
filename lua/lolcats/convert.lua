-- convert.lua: tensors from any file that can be read into any format that can be written, a piece at a time, and
-- what a file holds as a table. recipes/convert.lua and recipes/inspect.lua are the commands.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

local DTYPES = { f32 = 1, bf16 = 1, f16 = 1, f64 = 1, q4_0 = 1, q4_1 = 1, q5_0 = 1, q5_1 = 1, q8_0 = 1 }

-- What a tensor becomes: floats and blocks take the wanted dtype; integers stay. Blocks of rows that cannot be cut
-- stay f16.
local function target_dtype(info, dtype, format)
    local kind = info.dtype
    local float = kind == "f32" or kind == "bf16" or kind == "f16" or kind == "f64"
    local blocks = kind and kind:match "^i?q%d" or not kind and info.file_dtype:match "^I?Q%d"
    if dtype and dtype:match "^q" then
        local row = info.shape[#info.shape] or 1
        if #info.shape < 2 then return float and kind ~= "f32" and "f32" or nil end -- norms and biases stay whole
        if float then return row % 32 == 0 and dtype or "f16" end
        return nil
    end
    if (float or blocks) and dtype and dtype ~= kind then return dtype end
    if blocks and format ~= "gguf" then return "f16" end
    return nil
end

-- What the source says of itself, as the target can hold it: metadata, and in `o` values beside the tensors.
local function carry(src, format, o)
    if src.format == "gguf" or format == "gguf" then
        if src.format == format then o.like = src end
        return nil
    end
    if src.format == "torch" and format == "torch" then
        local values = {}
        for k, v in pairs(src:meta() or {}) do
            local plain = type(v) ~= "table" or v == files.null
            if type(k) == "string" and plain then values[k] = v end
        end
        for k in pairs(src.description and src:description() or {}) do values[k] = nil end
        o.values = next(values) and values or nil
    end
    return src:description()
end

--- Writes what `from` holds (a file, or a folder with one, with shards or with a distributed checkpoint) to `to`: a
--- file by its ending (.safetensors, .pt, .bin, .gguf) or a folder, which gets a model's layout. opts: dtype (f32,
--- bf16, f16, f64; into .gguf also q8_0, q5_1, q5_0, q4_1, q4_0), max_shard (bytes; of folders). Names and values
--- stay as they are. Returns the number of tensors and of files.
function M.convert(from, to, opts)
    opts = opts or {}
    if opts.dtype and not DTYPES[opts.dtype] then
        lc.fail("dtype '%s' is not one that can be written: f32, bf16, f16, f64, and into .gguf q8_0, q5_1, q5_0, " ..
                "q4_1, q4_0", opts.dtype)
    end
    local format = files.tensor_format(to)
    if not format and to:match "%.%w+$" and not files.is_dir(to) then
        lc.fail("%s: its ending is not one that can be written: .safetensors, .pt, .pth, .bin, .gguf, or a folder's " ..
                "name without one", to)
    end
    if opts.dtype and opts.dtype:match "^q" and format ~= "gguf" then
        lc.fail("%s: %s is only held by .gguf files", to, opts.dtype)
    end
    local src = files.open_tensors(from)
    local list = {}
    for _, name in ipairs(src:names()) do
        local dtype = target_dtype(src:info(name), opts.dtype, format or "safetensors")
        list[#list + 1] = { name = name, file = src, dtype = dtype }
    end
    local o, shards = {}, 1
    local metadata = carry(src, format or "safetensors", o)
    if (format or "safetensors") == "safetensors" and not metadata then metadata = { format = "pt" } end
    if format then
        files.save_tensors(to, list, metadata, o)
    else
        shards = files.save_sharded(to, list, { max_shard = opts.max_shard, metadata = metadata })
    end
    src:close()
    return #list, shards
end

--- What a file holds: {path, format, tensors = {{name, dtype, shape, bytes, offset}}, metadata, count, elements,
--- bytes}.
function M.inspect(path)
    local f = files.open_tensors(path)
    local out = { path = path, format = f.format, tensors = files.array {}, metadata = f:meta() or {},
                  elements = 0, bytes = 0 }
    for _, name in ipairs(f:names()) do
        local info = f:info(name)
        local n = 1
        for _, d in ipairs(info.shape) do n = n * d end
        out.tensors[#out.tensors + 1] = {
            name = name, dtype = info.file_dtype, shape = files.array(info.shape), bytes = info.bytes,
            offset = info.offset, file = info.path ~= path and files.basename(info.path) or nil,
        }
        out.elements, out.bytes = out.elements + n, out.bytes + info.bytes
    end
    out.count = #out.tensors
    local keys = f.meta_keys and f:meta_keys() or {}
    for _, key in ipairs(keys) do -- long arrays: only how long they are
        if out.metadata[key] == nil then out.metadata[key] = ("<%d values>"):format(#(f:meta(key) or {})) end
    end
    f:close()
    return out
end

return M
