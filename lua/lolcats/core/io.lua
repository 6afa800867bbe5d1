-- Files and documents over FFI: whole files, folders, locks, digests, JSON and YAML into Lua values, JSON out, and
-- files of tensors. lolcats.files is the public face; this module holds every C call that it needs.
local bridge = require "lolcats.core.ffi"
local tensor = require "lolcats.core.tensor"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

-- ---- whole files --------------------------------------------------------------------------------------------------
local function text_argument(what, v)
  if type(v) ~= "string" then bridge.fail("%s must be a string; got %s", what, type(v)) end
  if v:find("\0", 1, true) then bridge.fail("%s holds a zero byte", what) end
  return v
end

-- A string from memory that C allocated.
local function take_text(data, length)
  local text = ffi.string(data, length)
  C.lc_free(data)
  return text
end

function M.read(path)
  local data, length = ffi.new("char *[1]"), ffi.new("double[1]")
  check(C.lc_read_file(text_argument("the path", path), data, length), "read")
  return take_text(data[0], length[0])
end

-- Whole or not at all: written aside, synced, renamed.
function M.write(path, text)
  if type(text) ~= "string" then bridge.fail("write: the text must be a string; got %s", type(text)) end
  check(C.lc_write_file(text_argument("the path", path), text, #text), "write")
end

-- Adds to the end of a file; for logs, one line a call.
function M.append(path, text)
  local file, why = io.open(text_argument("the path", path), "ab")
  if not file then bridge.raise("EIO", "append", "append: " .. why) end
  local ok, problem = file:write(text)
  if ok then ok, problem = file:close() else file:close() end
  if not ok then bridge.raise("EIO", "append", ("append: %s: %s"):format(path, tostring(problem))) end
end

local KINDS = {[1] = "file", [2] = "folder", [3] = "other"}
function M.kind(path) return KINDS[C.lc_path_kind(text_argument("the path", path))] end
function M.exists(path) return M.kind(path) ~= nil end
function M.is_file(path) return M.kind(path) == "file" end
function M.is_folder(path) return M.kind(path) == "folder" end
function M.make_dirs(path) check(C.lc_make_dirs(text_argument("the path", path)), "make_dirs") end
function M.remove(path) check(C.lc_remove(text_argument("the path", path)), "remove") end
function M.rename(from, to)
  check(C.lc_rename(text_argument("the path", from), text_argument("the path", to)), "rename")
end

-- The sorted names in a folder.
function M.list(path)
  local data, length = ffi.new("char *[1]"), ffi.new("double[1]")
  check(C.lc_list_dir(text_argument("the path", path), data, length), "list")
  local names = {}
  for name in take_text(data[0], length[0]):gmatch("[^%z]+") do names[#names + 1] = name end
  return names
end

-- A lock held until unlock() or the end of the process; raises EIO when another process holds it.
function M.lock(path)
  local fd = ffi.new("int32_t[1]")
  check(C.lc_lock_file(text_argument("the path", path), fd), "lock")
  local id = fd[0]
  return {path = path, unlock = function()
    if id then check(C.lc_unlock_file(id), "unlock") end
    id = nil
  end}
end

-- Of a string, or of the memory of a contiguous CPU tensor.
function M.sha256(what)
  local hex = ffi.new("char[65]")
  if bridge.is_tensor(what) then
    check(C.lc_sha256(what:data(), what:nbytes(), hex), "sha256")
  else
    check(C.lc_sha256(what, #what, hex), "sha256")
  end
  return ffi.string(hex)
end

function M.gunzip(text, limit)
  local data, length = ffi.new("char *[1]"), ffi.new("double[1]")
  check(C.lc_gunzip(text, #text, limit or 2 ^ 31, data, length), "gunzip")
  return take_text(data[0], length[0])
end

-- ---- documents ----------------------------------------------------------------------------------------------------
M.null = setmetatable({}, {__tostring = function() return "null" end,
                           __newindex = function() bridge.fail("files.null is a constant") end})
local array_mark = {}
M.array_mark = array_mark

-- Marks a table as an array, which only an empty one needs.
function M.array(t) return setmetatable(t or {}, array_mark) end

local NULL, BOOL, NUMBER, STRING, ARRAY = 0, 1, 2, 3, 4
local length_out = ffi.new("int32_t[1]")

local function to_value(d, node)
  local kind = C.lc_doc_kind(d, node)
  if kind == NULL then return M.null end
  if kind == BOOL then return C.lc_doc_number(d, node) ~= 0 end
  if kind == NUMBER then return C.lc_doc_number(d, node) end
  if kind == STRING then
    local p = C.lc_doc_string(d, node, length_out)
    return ffi.string(p, length_out[0])
  end
  local out, child, i = {}, C.lc_doc_first(d, node), 0
  if kind == ARRAY then
    while child > 0 do
      i = i + 1
      out[i] = to_value(d, child)
      child = C.lc_doc_next(d, child)
    end
    return i == 0 and M.array(out) or out
  end
  while child > 0 do
    local p = C.lc_doc_key(d, child, length_out)
    out[ffi.string(p, length_out[0])] = to_value(d, child)
    child = C.lc_doc_next(d, child)
  end
  return out
end

-- The values of a document that another core module read.
function M.from_doc(d) return to_value(d, 0) end

-- A JSON or YAML text as Lua values; `name` is what errors call it.
function M.parse(format, name, text)
  if type(text) ~= "string" then bridge.fail("the text of %s must be a string; got %s", name, type(text)) end
  local out = ffi.new("lc_doc *[1]")
  check(C.lc_doc_parse(out, format, name, text, #text))
  local d = ffi.gc(out[0], C.lc_doc_free)
  local value = to_value(d, 0)
  C.lc_doc_free(ffi.gc(d, nil))
  return value
end

local ESCAPES = {['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r",
                 ["\t"] = "\\t"}
-- Bytes that are no UTF-8 become U+FFFD: what is written here must be readable, whatever a model has said.
local function valid_utf8(s)
  if not s:find("[\128-\255]") then return s end
  local out, at, n = {}, 1, #s
  while at <= n do
    local plain = s:match("^[%z\1-\127]+", at)
    local c = plain or s:match("^[\194-\223][\128-\191]", at) or s:match("^\224[\160-\191][\128-\191]", at)
      or s:match("^[\225-\236\238\239][\128-\191][\128-\191]", at) or s:match("^\237[\128-\159][\128-\191]", at)
      or s:match("^\240[\144-\191][\128-\191][\128-\191]", at) or s:match("^[\241-\243][\128-\191][\128-\191][\128-\191]", at)
      or s:match("^\244[\128-\143][\128-\191][\128-\191]", at)
    out[#out + 1] = c or "\239\191\189"
    at = at + (c and #c or 1)
  end
  return table.concat(out)
end

local function quote(s)
  s = valid_utf8(s)
  return '"' .. s:gsub('[%c"\\\127]', function(c) return ESCAPES[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

local function number_text(v, path)
  if v ~= v or v == math.huge or v == -math.huge then
    bridge.fail("to_json: %s is %s, which JSON cannot hold", path, tostring(v))
  end
  if v % 1 == 0 and math.abs(v) < 2 ^ 53 then return ("%.0f"):format(v) end
  local short = ("%.15g"):format(v)
  return tonumber(short) == v and short or ("%.17g"):format(v)
end

local function is_array(t, path)
  if getmetatable(t) == array_mark then return true end
  local n, count = #t, 0
  for key in next, t do
    count = count + 1
    if type(key) ~= "string" and type(key) ~= "number" then
      bridge.fail("to_json: %s has a %s as key", path, type(key))
    end
  end
  if n > 0 and count == n then return true end
  if n > 0 then bridge.fail("to_json: %s mixes positions and names", path) end
  return false
end

local write_value
local function write_table(t, path, out, step, depth)
  if depth > 200 then bridge.fail("to_json: %s nests too deep (does it hold itself?)", path) end
  local array = is_array(t, path)
  local newline = step and "\n" .. (" "):rep(step * (depth + 1)) or ""
  local keys = {}
  if array then
    for i = 1, #t do keys[i] = i end
  else
    for key in next, t do
      if type(key) ~= "string" then
        bridge.fail("to_json: %s has the key %s, which is not a string", path, tostring(key))
      end
      keys[#keys + 1] = key
    end
    table.sort(keys)
  end
  local flat = array and step and #t > 0
  for i = 1, flat and #t or 0 do flat = flat and type(t[i]) ~= "table" end
  out[#out + 1] = array and "[" or "{"
  for i, key in ipairs(keys) do
    if i > 1 then out[#out + 1] = flat and ", " or "," end
    if not flat then out[#out + 1] = newline end
    if not array then out[#out + 1] = quote(key) .. (step and ": " or ":") end
    write_value(t[key], array and ("%s[%d]"):format(path, key) or path .. "." .. key, out, step, depth + 1)
  end
  if step and #keys > 0 and not flat then out[#out + 1] = "\n" .. (" "):rep(step * depth) end
  out[#out + 1] = array and "]" or "}"
end

function write_value(v, path, out, step, depth)
  local kind = type(v)
  if v == nil or rawequal(v, M.null) then
    out[#out + 1] = "null"
  elseif kind == "boolean" then
    out[#out + 1] = tostring(v)
  elseif kind == "number" then
    out[#out + 1] = number_text(v, path)
  elseif kind == "string" then
    out[#out + 1] = quote(v)
  elseif kind == "table" then
    write_table(v, path, out, step, depth)
  else
    bridge.fail("to_json: %s is a %s, which JSON cannot hold", path,
                bridge.is_tensor(v) and "tensor (use :totable())" or kind)
  end
end

-- JSON with sorted keys; {indent = 2} spreads it over lines.
function M.to_json(value, options)
  local out = {}
  write_value(value, "value", out, options and options.indent, 0)
  return table.concat(out)
end

-- ---- one file of tensors ------------------------------------------------------------------------------------------
local File = {}
File.__index = File

function M.open_tensor_file(path)
  local out = ffi.new("lc_file *[1]")
  check(C.lc_file_open(out, text_argument("the path", path)), "open_tensors")
  local f = ffi.gc(out[0], C.lc_file_close)
  return setmetatable({handle = f, path = path, format = ffi.string(C.lc_file_format(f))}, File)
end

local function open_handle(self)
  if not self.handle then bridge.fail("%s is closed", self.path) end
  return self.handle
end

function File:close()
  if self.handle then C.lc_file_close(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

function File:names()
  local f, names = open_handle(self), {}
  for i = 0, C.lc_file_count(f) - 1 do names[i + 1] = ffi.string(C.lc_file_tensor_name(f, i)) end
  return names
end

function File:has(name) return C.lc_file_find(open_handle(self), name) >= 0 end

local function index_of(self, name)
  local i = C.lc_file_find(open_handle(self), tostring(name))
  if i < 0 then
    local known = {}
    for _, n in ipairs(self:names()) do known[n] = true end
    local near = bridge.nearest(tostring(name), known)
    bridge.raise("EARG", "open_tensors", ("%s has no tensor '%s'%s")
      :format(self.path, tostring(name), near and ("; it has '" .. near .. "'") or ""))
  end
  return i
end

function File:info(name)
  local f, i = open_handle(self), index_of(self, name)
  local shape = {}
  for d = 1, C.lc_file_ndim(f, i) do shape[d] = C.lc_file_dim(f, i, d - 1) end
  local dtype = C.lc_file_dtype(f, i)
  return {name = name, shape = shape, dtype = dtype >= 0 and tensor.dtype_name[dtype] or nil,
          bytes = C.lc_file_bytes(f, i),
          file_dtype = ffi.string(C.lc_file_dtype_name(f, i)), offset = C.lc_file_offset(f, i), path = self.path}
end

-- The handle of C, and the place of a tensor, for those who write.
function File:stored(name) return open_handle(self), name and index_of(self, name) end

-- A read-only view of the mapped file in its own dtype, or with {dtype = "f32"} a converted copy.
function File:tensor(name, options)
  local f, i = open_handle(self), index_of(self, name)
  local wanted = options and options.dtype and tensor.dtype_id(options.dtype)
  local x
  if not wanted or wanted == C.lc_file_dtype(f, i) then
    x = bridge.handle()
    check(C.lc_file_tensor(f, i, x), "open_tensors")
    x = bridge.adopt(x)
  else
    x = tensor.empty(self:info(name).shape, {dtype = options.dtype, device = "cpu"})
    check(C.lc_file_read(f, i, wanted, x), "open_tensors")
  end
  local device = options and options.device or tensor.default_device()
  if device ~= "cpu" then x = x:to(device) end
  return x:set_name(name)
end

-- Converts into an existing tensor of the same shape (a piece of a larger buffer).
function File:read_into(name, into)
  check(C.lc_file_read(open_handle(self), index_of(self, name), C.lc_dtype_of(into), into), "read_into")
  return into
end

local function meta_value(f, i)
  local kind = C.lc_file_meta_kind(f, i)
  local function element(k, e)
    if k == STRING then
      local p = C.lc_file_meta_string(f, i, e, length_out)
      return ffi.string(p, length_out[0])
    end
    local v = C.lc_file_meta_number(f, i, e)
    if k == BOOL then return v ~= 0 end
    return v
  end
  if kind ~= ARRAY then return element(kind, -1) end
  local out, n = {}, C.lc_file_meta_size(f, i)
  if n == 0 then return M.array(out) end
  local first = C.lc_file_meta_string(f, i, 0, length_out)
  local k = first ~= nil and STRING or NUMBER
  for e = 0, n - 1 do out[e + 1] = element(k, e) end
  return out
end

-- What a PyTorch file holds beside tensors.
local function extra_values(self)
  local d = C.lc_file_extra(open_handle(self))
  return d ~= nil and to_value(d, 0) or {}
end

-- One value of the file's metadata, nil when there is none; without a key, all short ones.
function File:meta(key)
  local f = open_handle(self)
  if key ~= nil then
    local i = C.lc_file_meta_find(f, key)
    if i < 0 then return extra_values(self)[key] end
    return meta_value(f, i)
  end
  local out = extra_values(self)
  if getmetatable(out) then out = {} end -- an empty array's mark
  for i = 0, C.lc_file_meta_count(f) - 1 do
    if C.lc_file_meta_kind(f, i) ~= ARRAY or C.lc_file_meta_size(f, i) <= 64 then
      out[ffi.string(C.lc_file_meta_key(f, i))] = meta_value(f, i)
    end
  end
  return out
end

-- The strings that a safetensors file says of itself, also where they went through a PyTorch file; nil when there are none.
function File:description()
  local f, out = open_handle(self), {}
  local d = self.format == "torch" and C.lc_file_described(f) == 0
  if d or self.format == "gguf" then return nil end
  for i = 0, C.lc_file_meta_count(f) - 1 do
    if C.lc_file_meta_kind(f, i) == STRING then out[ffi.string(C.lc_file_meta_key(f, i))] = meta_value(f, i) end
  end
  return out
end

function File:meta_keys()
  local f, keys = open_handle(self), {}
  for i = 0, C.lc_file_meta_count(f) - 1 do keys[i + 1] = ffi.string(C.lc_file_meta_key(f, i)) end
  return keys
end

return M
