-- files: reading and writing as recipes and the library see it: text, JSON, YAML, folders, and tensors in one file or
-- in shards. JSON's null is files.null; an empty array is made by files.array{}.
local io_core = require "lolcats.core.io"
local save_core = require "lolcats.core.save"
local bridge = require "lolcats.core.ffi"
local files = {}

for _, name in ipairs {"read", "write", "append", "kind", "exists", "is_file", "is_folder", "make_dirs", "remove",
                       "rename", "list",
                       "lock", "sha256", "gunzip", "null", "array", "to_json"} do
  files[name] = io_core[name]
end
files.is_dir = io_core.is_folder

-- ---- paths --------------------------------------------------------------------------------------------------------
function files.join(...)
  local out = ""
  for i = 1, select("#", ...) do
    local part = select(i, ...)
    if part:sub(1, 1) == "/" or out == "" then
      out = part
    else
      out = out:gsub("/+$", "") .. "/" .. part
    end
  end
  return out
end

function files.dirname(path) return path:match("^(.*[^/])/+[^/]*$") or (path:sub(1, 1) == "/" and "/" or ".") end
function files.basename(path) return path:match("([^/]+)/*$") or path end

-- ---- documents ----------------------------------------------------------------------------------------------------
function files.parse_json(text, name) return io_core.parse("json", name or "text", text) end
function files.parse_yaml(text, name) return io_core.parse("yaml", name or "text", text) end
function files.read_json(path) return io_core.parse("json", path, io_core.read(path)) end
function files.read_yaml(path) return io_core.parse("yaml", path, io_core.read(path)) end

-- JSON with sorted keys, indented by two, whole or not at all; {indent = false} for one line.
function files.write_json(path, value, options)
  local indent = 2
  if options and options.indent ~= nil then indent = options.indent or nil end
  io_core.write(path, io_core.to_json(value, {indent = indent}) .. "\n")
end

-- ---- tensors ------------------------------------------------------------------------------------------------------
local FORMATS = {safetensors = "safetensors", pt = "torch", pth = "torch", bin = "torch", gguf = "gguf"}

--- The format that a file's ending stands for: "safetensors", "torch", "gguf", or nil.
function files.tensor_format(path) return FORMATS[(path:match("%.(%w+)$") or ""):lower()] end

-- {name = tensor}, or a list of {name =, tensor =} or {name =, file =, from =, dtype =}, as a list.
local function entry_list(tensors)
  if type(tensors) ~= "table" then bridge.fail("save_tensors: a table {name = tensor} is needed") end
  if #tensors > 0 then return tensors end
  local list = {}
  for name, x in pairs(tensors) do
    if type(name) ~= "string" or not bridge.is_tensor(x) then
      bridge.fail("save_tensors: every entry is name = tensor; '%s' is a %s", tostring(name), type(x))
    end
    list[#list + 1] = {name = name, tensor = x}
  end
  table.sort(list, function(a, b) return a.name < b.name end)
  return list
end

--- Writes {name = tensor} as the file's ending says (.safetensors, .pt, .bin, .gguf; else safetensors), whole or
--- not at all. Tensors of an open file are copied, or converted, a piece at a time: {{name =, file =, from =, dtype
--- =}, ..}. metadata: {string = string}. options: format, values and wrap (.pt: plain values beside the tensors,
--- the key that holds them), like (.gguf: an open GGUF whose metadata is taken over).
function files.save_tensors(path, tensors, metadata, options)
  if type(path) ~= "string" then bridge.fail("save_tensors: the path must be a string; got %s", type(path)) end
  local o = {metadata = metadata}
  for k, v in pairs(options or {}) do o[k] = v end
  save_core.write(path, o.format or files.tensor_format(path) or "safetensors", entry_list(tensors), o)
end

local function entry_bytes(e)
  if e.tensor then return e.tensor:nbytes() end
  local info = e.file:info(e.from or e.name)
  if not e.dtype then return info.bytes end
  local n = ({f32 = 4, f64 = 8, i32 = 4, i64 = 8, u8 = 1})[e.dtype] or 2
  for _, d in ipairs(info.shape) do n = n * d end
  return n
end

-- In the order given, each shard at most `most` bytes (or one tensor).
local function cut(list, most)
  local shards, total = {{bytes = 0}}, 0
  for _, e in ipairs(list) do
    local bytes, last = entry_bytes(e), shards[#shards]
    if #last > 0 and last.bytes + bytes > most then
      last = {bytes = 0}
      shards[#shards + 1] = last
    end
    last[#last + 1] = e
    last.bytes = last.bytes + bytes
    total = total + bytes
  end
  return shards, total
end

--- Writes a model's tensors into a folder as Hugging Face lays them out: model.safetensors, or above max_shard
--- bytes (5 GB) model-00001-of-0000N.safetensors and an index. Shards take their names when all are written, then
--- comes the index, and old shards go after it: a save that is broken off leaves the old model. options: max_shard,
--- metadata, format ("torch": pytorch_model.bin).
function files.save_sharded(folder, tensors, options)
  local o = options or {}
  local torch = o.format == "torch"
  local stem, ending = torch and "pytorch_model" or "model", torch and ".bin" or ".safetensors"
  local list = entry_list(tensors)
  local shards, total = cut(list, o.max_shard or 5e9)
  local index = files.join(folder, stem .. ending .. ".index.json")
  local metadata = o.metadata or not torch and {format = "pt"} or nil
  files.make_dirs(folder)
  local function save(name, part)
    files.save_tensors(files.join(folder, name), part, metadata, {format = o.format or "safetensors"})
  end
  local written = {}
  if #shards == 1 then
    written[stem .. ending] = true
    save(stem .. ending, shards[1])
    if files.is_file(index) then files.remove(index) end
  else
    local map = {}
    for i, part in ipairs(shards) do
      local name = ("%s-%05d-of-%05d%s"):format(stem, i, #shards, ending)
      written[name] = true
      for _, e in ipairs(part) do map[e.name] = name end
      save(name .. ".new", part)
    end
    for name in pairs(written) do files.rename(files.join(folder, name .. ".new"), files.join(folder, name)) end
    files.write_json(index, {metadata = {total_size = total}, weight_map = map})
    if files.is_file(files.join(folder, stem .. ending)) then files.remove(files.join(folder, stem .. ending)) end
  end
  for _, name in ipairs(files.list(folder)) do -- other shards, and what a broken-off save left behind
    local shard = name:match("^" .. stem .. "%-%d+%-of%-%d+%" .. ending .. "$")
    local left = name:match("^" .. stem .. "%-%d+%-of%-%d+%" .. ending .. "%.new")
    if (shard and not written[name]) or left then files.remove(files.join(folder, name)) end
  end
  return #shards
end

-- A folder of shards under one index file, with the methods of a single file.
local Shards = {}
Shards.__index = Shards

local function shard_map(folder, index_path)
  local index = files.read_json(index_path)
  local map = type(index) == "table" and index.weight_map
  if type(map) ~= "table" then
    bridge.raise("EPARSE", "open_tensors", index_path .. ": the object 'weight_map' is missing")
  end
  local parts = {}
  for name, shard in pairs(map) do
    if type(name) ~= "string" or type(shard) ~= "string" or shard:find("/", 1, true) or shard == ".." then
      bridge.raise("EPARSE", "open_tensors",
                   ("%s: the entry '%s' does not name a file of the folder"):format(index_path, tostring(name)))
    end
    parts[shard] = true
  end
  for shard in pairs(parts) do
    if not files.is_file(files.join(folder, shard)) then
      bridge.raise("EIO", "open_tensors", ("the shard %s is missing from %s (named in %s)")
        :format(shard, folder, files.basename(index_path)))
    end
  end
  return map, parts
end

local function open_shards(folder, index_path)
  local map, parts = shard_map(folder, index_path)
  local self = setmetatable({path = folder, format = "safetensors", map = map, parts = {}}, Shards)
  for shard in pairs(parts) do
    self.parts[shard] = io_core.open_tensor_file(files.join(folder, shard))
    self.format = self.parts[shard].format
  end
  for name, shard in pairs(map) do
    if not self.parts[shard]:has(name) then
      bridge.raise("EPARSE", "open_tensors",
                   ("%s: the index places '%s' in %s, which does not hold it"):format(index_path, name, shard))
    end
  end
  return self
end

local function part_of(self, name)
  local shard = self.map[name]
  if not self.parts then bridge.fail("%s is closed", self.path) end
  if not shard then
    local near = bridge.nearest(tostring(name), self.map)
    bridge.raise("EARG", "open_tensors", ("%s has no tensor '%s'%s")
      :format(self.path, tostring(name), near and ("; it has '" .. near .. "'") or ""))
  end
  return self.parts[shard]
end

function Shards:names()
  local names = {}
  for name in pairs(self.map) do names[#names + 1] = name end
  table.sort(names)
  return names
end
function Shards:has(name) return self.map[name] ~= nil end
function Shards:info(name) return part_of(self, name):info(name) end
function Shards:tensor(name, options) return part_of(self, name):tensor(name, options) end
function Shards:stored(name) return part_of(self, name):stored(name) end
function Shards:read_into(name, into) return part_of(self, name):read_into(name, into) end
function Shards:meta(key)
  local _, part = next(self.parts)
  return part and part:meta(key)
end
function Shards:description()
  local _, part = next(self.parts)
  return part and part:description()
end
function Shards:close()
  for _, part in pairs(self.parts or {}) do part:close() end
  self.parts = nil
end

local SINGLE = {"model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin"}
local INDEX = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}

local function folder_file(folder)
  for _, name in ipairs(SINGLE) do
    if files.is_file(files.join(folder, name)) then return files.join(folder, name) end
  end
  local found = {}
  for _, pattern in ipairs {"%.safetensors$", "%.gguf$", "%.pt$"} do
    for _, name in ipairs(#found == 0 and files.list(folder) or {}) do
      if name:match(pattern) then found[#found + 1] = name end
    end
  end
  if #found == 1 then return files.join(folder, found[1]) end
  bridge.raise("EIO", "open_tensors", #found == 0
    and folder .. ": no model.safetensors, no index of shards, and no other .safetensors, .gguf or .pt file"
    or ("%s: which file? there are %s"):format(folder, table.concat(found, ", ")))
end

-- files.open_tensors(path): a safetensors, GGUF or PyTorch file (.pt, .bin), an index of shards, or a folder with
-- one of them or with a distributed checkpoint. Methods: names(), has(name), info(name), tensor(name[, {dtype =,
-- device =}]), read_into(name, tensor), meta([key]), close(). Names in a PyTorch file are the keys on the way to a
-- tensor, joined by dots, without a wrapper (model_state_dict, state_dict, model) that holds all of them; meta()
-- has what is no tensor.
function files.open_tensors(path)
  if path:match("%.index%.json$") and files.is_file(path) then return open_shards(files.dirname(path), path) end
  if not files.is_folder(path) then return io_core.open_tensor_file(path) end
  for _, name in ipairs(INDEX) do
    local index = files.join(path, name)
    if files.is_file(index) then return open_shards(path, index) end
  end
  if files.is_file(files.join(path, ".metadata")) then return io_core.open_tensor_file(path) end
  return io_core.open_tensor_file(folder_file(path))
end

--- All tensors of a file or folder of any format as {name = tensor}: views of the mapped file, or copies where they are
--- converted ({dtype = "f32"}), moved ({device = "cuda:0"}) or lie scattered.
function files.load_tensors(path, options)
  local f, out = files.open_tensors(path), {}
  for _, name in ipairs(f:names()) do out[name] = f:tensor(name, options) end
  f:close()
  return out
end

return files
