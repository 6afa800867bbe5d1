-- Records of files over FFI: one at a time as Lua values, in a memory that holds one; and files of plain numbers, written
-- piece by piece and mapped. lolcats.data.source and lolcats.data.stream are the public faces.
local bridge = require "lolcats.core.ffi"
local io_core = require "lolcats.core.io"
local tensor = require "lolcats.core.tensor"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

local Records = {}
Records.__index = Records
local out = ffi.new("lc_doc *[1]")

-- An open file. format: nil, by its name; columns: a list of names, of a parquet file.
function M.open(path, format, columns)
  local r = ffi.new("lc_records *[1]")
  local names = columns and table.concat(columns, "\n") or nil
  check(C.lc_records_open(r, path, format, names), "records")
  return setmetatable({handle = ffi.gc(r[0], C.lc_records_close), path = path}, Records)
end

-- The next record, nil at the end.
function Records:next()
  if not self.handle then return nil end
  check(C.lc_records_next(self.handle, out), "records")
  if out[0] == nil then
    self:close()
    return nil
  end
  local d = ffi.gc(out[0], C.lc_doc_free)
  local value = io_core.from_doc(d)
  C.lc_doc_free(ffi.gc(d, nil))
  return value
end

-- How many there are, where the file says it.
function Records:count()
  local n = self.handle and C.lc_records_count(self.handle) or -1
  if n >= 0 then return n end
end

function Records:close()
  if self.handle then C.lc_records_close(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

-- ---- files of numbers -----------------------------------------------------------------------------------------------
-- n numbers of a dtype from byte `offset` of a file: a view of its mapping.
function M.map(path, offset, dtype, n)
  local x = bridge.handle()
  check(C.lc_map_file(x, path, offset, tensor.dtype_id(dtype), 1, ffi.new("int32_t[1]", n)), "map")
  return bridge.adopt(x)
end

local Writer = {}
Writer.__index = Writer

-- A file that grows by what is written from the beginning of CPU tensors.
function M.writer(path)
  local file, why = io.open(path, "wb")
  if not file then bridge.raise("EIO", "writer", "cannot write " .. why) end
  return setmetatable({file = file, path = path}, Writer)
end

function Writer:write(x, n)
  local bytes = n * C.lc_dtype_bytes(C.lc_dtype_of(x), 1)
  local ok, why = self.file:write(ffi.string(x:data(), bytes))
  if not ok then
    self:close()
    bridge.raise("EIO", "writer", ("cannot write %s: %s"):format(self.path, why))
  end
end

function Writer:close()
  if not self.file then return end
  local ok, why = self.file:close()
  self.file = nil
  if not ok then bridge.raise("EIO", "writer", ("cannot write %s: %s"):format(self.path, tostring(why))) end
end

return M
