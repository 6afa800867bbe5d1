-- Writing files of tensors over FFI: safetensors, torch.save's format and GGUF, from tensors in memory or straight
-- from other files, converted on the way. lolcats.files is the public face.
local bridge = require "lolcats.core.ffi"
local tensor = require "lolcats.core.tensor"
local io_core = require "lolcats.core.io"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

local NULL, BOOL, NUMBER, REAL = 0, 1, 2, -1
local GGUF_TYPES = {u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, bool = 7, string = 8, u64 = 10,
    i64 = 11, f64 = 12}

local function describe(w, texts)
  local keys = {}
  for key, text in pairs(texts or {}) do
    if type(key) ~= "string" or type(text) ~= "string" then
      bridge.fail("save_tensors: metadata '%s' must be a string", tostring(key))
    end
    keys[#keys + 1] = key
  end
  table.sort(keys)
  if texts and #keys == 0 then check(C.lc_writer_describe(w, nil, nil, 0), "save_tensors") end
  for _, key in ipairs(keys) do check(C.lc_writer_describe(w, key, texts[key], #texts[key]), "save_tensors") end
end

-- Plain values of torch.save: strings, numbers, booleans, files.null. {real = x} is a float even where it is whole.
local function add_values(w, values)
  local keys = {}
  for key in pairs(values or {}) do keys[#keys + 1] = key end
  table.sort(keys)
  for _, key in ipairs(keys) do
    local v, kind, number, text = values[key], nil, 0, nil
    if rawequal(v, io_core.null) then kind = NULL
    elseif type(v) == "string" then kind, text = 3, v
    elseif type(v) == "boolean" then kind, number = BOOL, v and 1 or 0
    elseif type(v) == "number" then kind, number = NUMBER, v
    elseif type(v) == "table" and type(v.real) == "number" then kind, number = REAL, v.real
    else
      bridge.fail("save_tensors: the value '%s' is a %s; only strings, numbers and booleans can stand beside tensors",
                  key, type(v))
    end
    check(C.lc_writer_value(w, key, kind, number, text, text and #text or 0), "save_tensors")
  end
end

local function gguf_kind(key, v)
  if type(v) == "string" then return GGUF_TYPES.string, 0, v end
  if type(v) == "boolean" then return GGUF_TYPES.bool, v and 1 or 0 end
  if type(v) == "number" then
    local whole = v % 1 == 0 and math.abs(v) < 2 ^ 53
    return whole and (v >= 0 and v < 2 ^ 32 and GGUF_TYPES.u32 or math.abs(v) < 2 ^ 31 and GGUF_TYPES.i32 or
        GGUF_TYPES.i64)
      or GGUF_TYPES.f32, v
  end
  if type(v) == "table" and GGUF_TYPES[v[1]] and #v == 2 and type(v[2]) == "number" then
    return GGUF_TYPES[v[1]], v[2]
  end
  bridge.fail("save_tensors: the GGUF value '%s' is a %s", key, type(v))
end

-- Metadata of a GGUF: strings, booleans, numbers (u32 where they fit, f32 where they are not whole), {"i64", n},
-- {array = {..}}.
local function add_gguf_values(w, values)
  local keys = {}
  for key in pairs(values or {}) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b)
    if (a == "general.architecture") ~= (b == "general.architecture") then return a == "general.architecture" end
    return a < b
  end)
  for _, key in ipairs(keys) do
    local v = values[key]
    if type(v) == "table" and v.array then
      check(C.lc_writer_value(w, key, 9, 0, nil, 0), "save_tensors")
      for _, e in ipairs(v.array) do
        local kind, number, text = gguf_kind(key, v.type and type(e) == "number" and {v.type, e} or e)
        check(C.lc_writer_element(w, kind, number, text, text and #text or 0), "save_tensors")
      end
    else
      local kind, number, text = gguf_kind(key, v)
      check(C.lc_writer_value(w, key, kind, number, text, text and #text or 0), "save_tensors")
    end
  end
end

local function add_entry(w, e)
  if e.tensor then
    check(C.lc_writer_tensor(w, e.name, e.tensor), "save_tensors")
  else
    local f, i = e.file:stored(e.from or e.name)
    check(C.lc_writer_stored(w, e.name, f, i, e.dtype and tensor.dtype_id(e.dtype) or -1), "save_tensors")
  end
end

--- Writes a file of tensors. format: "safetensors", "torch" or "gguf". list: {name =, tensor =} or {name =, file =
--- an open file, from = its name there, dtype = what it becomes}. options: metadata (strings; safetensors and
--- torch), values (plain values beside the tensors: torch, or GGUF's metadata), wrap (torch: the key that holds the
--- tensors), like (an open GGUF whose metadata is taken over).
function M.write(path, format, list, options)
  local o = options or {}
  local out = ffi.new("lc_writer *[1]")
  if type(path) ~= "string" or path:find("\0", 1, true) then
    bridge.fail("save_tensors: the path must be a string")
  end
  check(C.lc_writer_open(out, path, format), "save_tensors")
  local w = ffi.gc(out[0], C.lc_writer_free)
  if format ~= "gguf" then describe(w, o.metadata) end
  if o.wrap then check(C.lc_writer_wrap(w, o.wrap), "save_tensors") end
  if format == "gguf" then add_gguf_values(w, o.values) else add_values(w, o.values) end
  if o.like then
    local f = o.like:stored()
    for i = 0, C.lc_file_meta_count(f) - 1 do check(C.lc_writer_copy_value(w, f, i), "save_tensors") end
  end
  for _, e in ipairs(list) do
    if type(e.name) ~= "string" or e.name:find("\0", 1, true) then
      bridge.fail("save_tensors: a tensor's name must be a string")
    end
    add_entry(w, e)
  end
  check(C.lc_writer_finish(w), "save_tensors")
  C.lc_writer_free(ffi.gc(w, nil))
end

return M
