-- Tensors as Lua sees them: what a handle answers (fields, methods, indexing, operators), how tensors are made from
-- sizes and Lua values and read back, and the compositions that have no row of their own. Ops themselves come from
-- core/ops.lua.
local bridge = require "lolcats.core.ffi"
local ops = require "lolcats.core.ops"
local ffi, C, handle = bridge.ffi, bridge.C, bridge.handle
local methods, fields, meta = bridge.methods, bridge.fields, bridge.meta
local check, try, adopt, is_tensor = bridge.check, bridge.try, bridge.adopt, bridge.is_tensor
local op = ops.functions
local floor = math.floor
local M = {}

-- ---- dtypes and devices -------------------------------------------------------------------------------------------
local dtype_name = {}
for id = 0, C.LC_DTYPE_COUNT - 1 do dtype_name[id] = ffi.string(C.lc_dtype_name(id)) end

-- How host memory of a dtype is read; bf16 and f16 are read as f32 after conversion.
local F32, F64, I32, I64, U8, BF16, F16 = 0, 3, 4, 5, 6, 1, 2
local host_type = {[F32] = "float", [F64] = "double", [I32] = "int32_t", [I64] = "int64_t", [U8] = "uint8_t",
                   [BF16] = "uint16_t", [F16] = "uint16_t"}
local default_dtype = F32

local function dtype_id(name)
  if name == nil then return default_dtype end
  local id = type(name) == "string" and C.lc_dtype_id(name) or -1
  if id < 0 then bridge.fail("unknown dtype '%s'; dtypes are f32 bf16 f16 f64 i32 i64 u8", tostring(name)) end
  return id
end

local default_device = 0

local function device_id(name)
  if name == nil then return default_device end
  if name == "cpu" then return 0 end
  local id = type(name) == "string" and C.lc_device_find(name) or -1
  if id < 0 then
    bridge.raise("EDEVICE", nil, ("no device '%s': %s"):format(tostring(name), ffi.string(C.lc_error_message())))
  end
  return id
end
M.dtype_id, M.device_id, M.dtype_name = dtype_id, device_id, dtype_name

-- The device of new tensors that name none, of tensors read from files, and of models loaded.
function M.default_device(name)
  local old = ffi.string(C.lc_device_name(default_device))
  if name then default_device = device_id(name) end
  return old
end

-- The dtype of new tensors that name none.
function M.default_dtype(name)
  local old = dtype_name[default_dtype]
  if name then default_dtype = dtype_id(name) end
  return old
end

-- ---- fields -------------------------------------------------------------------------------------------------------
local function ndim_of(x)
  local n = C.lc_ndim(x)
  if n < 0 then bridge.stale() end
  return n
end

function fields.shape(x)
  local shape = {}
  for d = 1, ndim_of(x) do shape[d] = C.lc_dim(x, d - 1) end
  return shape
end

function fields.dtype(x)
  ndim_of(x)
  return dtype_name[C.lc_dtype_of(x)]
end

function fields.device(x)
  ndim_of(x)
  return ffi.string(C.lc_device_name(C.lc_device_of(x)))
end

function fields.grad(x)
  local g = handle()
  check(C.lc_grad(g, x), "grad")
  if g._gen == 0 then return nil end
  return adopt(g)
end

fields.ndim = ndim_of
function fields.requires_grad(x) ndim_of(x) return C.lc_requires_grad(x) ~= 0 end
function fields.name(x) ndim_of(x) return ffi.string(C.lc_name(x)) end

function methods.dim(x) return ndim_of(x) end
function methods.numel(x) ndim_of(x) return C.lc_numel(x) end
function methods.is_contiguous(x) ndim_of(x) return C.lc_is_contiguous(x) ~= 0 end
function methods.is_alive(x) return C.lc_alive(x) ~= 0 end
function methods.storage_id(x) ndim_of(x) return C.lc_storage_id(x) end
function methods.storage_bytes(x) ndim_of(x) return C.lc_storage_bytes(x) end
function methods.nbytes(x) ndim_of(x) return C.lc_dtype_bytes(C.lc_dtype_of(x), C.lc_numel(x)) end

local function dim_index(x, d, name)
  local n = ndim_of(x)
  if type(d) ~= "number" or floor(d) ~= d or d == 0 or d > n or d < -n then
    bridge.raise("EARG", name, ("%s: dim %s of a tensor with %d dims; dims count from 1, or from the end with -1")
      :format(name, tostring(d), n))
  end
  return d > 0 and d - 1 or n + d
end

function methods.size(x, d)
  if d == nil then return fields.shape(x) end
  return C.lc_dim(x, dim_index(x, d, "size"))
end

function methods.stride(x, d)
  if d then return C.lc_stride(x, dim_index(x, d, "stride")) end
  local strides = {}
  for i = 1, ndim_of(x) do strides[i] = C.lc_stride(x, i - 1) end
  return strides
end

function methods.set_name(x, name)
  check(C.lc_set_name(x, name), "set_name")
  return x
end

function methods.drop(x) C.lc_drop(ffi.gc(x, nil)) end

-- ---- making tensors -----------------------------------------------------------------------------------------------
local dims_buffer = ffi.new("int32_t[?]", 64)

local function bad_shape(name, v)
  bridge.raise("EARG", name, ("%s: sizes are integers from 0; got %s"):format(name, tostring(v)))
end

local function new(name, n, dtype, device)
  local h = handle()
  try(name, C.lc_new, h, dtype, device, n, dims_buffer)
  return adopt(h)
end

-- (2, 3, {dtype = ...}) or ({2, 3}, {...}): fills dims_buffer; returns the number of dims and the options.
local function read_shape(name, ...)
  local first, count = (...), select("#", ...)
  local options, list = count > 0 and (select(count, ...)) or nil
  if type(first) == "table" and (first[1] ~= nil or next(first) == nil) then
    list, options = first, (select(2, ...))
  else
    list = {...}
    if type(options) == "table" then list[#list] = nil else options = nil end
  end
  local n = #list
  if n > 6 then bridge.fail("%s: a tensor has at most 6 dims; got %d", name, n) end
  for i = 1, n do
    local v = list[i]
    if type(v) ~= "number" or floor(v) ~= v or v < 0 or v > 0x7fffffff then bad_shape(name, v) end
    dims_buffer[i - 1] = v
  end
  return n, options
end

local OPTIONS = {dtype = true, device = true, requires_grad = true, name = true}
local NONE = {}
local function read_options(name, options)
  if options == nil then return NONE end
  if type(options) ~= "table" then
    bridge.fail("%s: options are a table like {dtype = \"f32\"}; got %s", name, type(options))
  end
  for key in pairs(options) do
    if not OPTIONS[key] then
      bridge.fail("%s: no option '%s'; options are dtype, device, requires_grad, name", name, tostring(key))
    end
  end
  return options
end

local function finish(x, o)
  if o.name then methods.set_name(x, o.name) end
  if o.requires_grad then check(C.lc_require_grad(x, 1), "requires_grad") end
  return x
end

local function maker(name, fill)
  return function(...)
    local n, options = read_shape(name, ...)
    local o = read_options(name, options)
    local x = new(name, n, dtype_id(o.dtype), device_id(o.device))
    if fill then fill(x) end
    return finish(x, o)
  end
end
M.zeros = maker("zeros")
M.empty = maker("empty")
M.ones = maker("ones", function(x) op.fill_(x, 1) end)
M.rand = maker("rand", function(x) op.uniform_(x) end)
M.randn = maker("randn", function(x) op.normal_(x) end)

function M.full(shape, value, options)
  if type(shape) == "number" then shape = {shape} end
  if type(value) ~= "number" then bridge.fail("full: value must be a number; got %s", type(value)) end
  local n = read_shape("full", shape)
  local o = read_options("full", options)
  return finish(op.fill_(new("full", n, dtype_id(o.dtype), device_id(o.device)), value), o)
end

-- arange(n): 0 .. n - 1; arange(start, stop[, step]): as PyTorch, without stop.
function M.arange(start, stop, step, options)
  if type(stop) == "table" then stop, options = nil, stop end
  if type(step) == "table" then step, options = nil, step end
  if stop == nil then start, stop = 0, start end
  step = step or 1
  if type(start) ~= "number" or type(stop) ~= "number" or type(step) ~= "number" or step == 0 then
    bridge.fail("arange: start, stop and step must be numbers, step not 0")
  end
  local o = read_options("arange", options)
  dims_buffer[0] = math.max(0, math.ceil((stop - start) / step))
  return finish(op.arange_(new("arange", 1, dtype_id(o.dtype), device_id(o.device)), start, step), o)
end

function M.eye(n, m, options)
  if type(m) == "table" then m, options = nil, m end
  local o = read_options("eye", options)
  local nd = read_shape("eye", {n, m or n})
  return finish(op.eye_(new("eye", nd, dtype_id(o.dtype), device_id(o.device))), o)
end

local function new_like(name, x, options)
  if not is_tensor(x) then bridge.fail("%s: a tensor is needed; got %s", name, type(x)) end
  local o = read_options(name, options)
  local n = ndim_of(x)
  for d = 0, n - 1 do dims_buffer[d] = C.lc_dim(x, d) end
  return new(name, n, o.dtype and dtype_id(o.dtype) or C.lc_dtype_of(x),
             o.device and device_id(o.device) or C.lc_device_of(x)), o
end
local function maker_like(name, fill)
  local function make(x, options)
    local y, o = new_like(name, x, options)
    if fill then fill(y) end
    return finish(y, o)
  end
  methods[name] = make
  return make
end
M.zeros_like = maker_like("zeros_like")
M.empty_like = maker_like("empty_like")
M.ones_like = maker_like("ones_like", function(x) op.fill_(x, 1) end)
M.rand_like = maker_like("rand_like", function(x) op.uniform_(x) end)
M.randn_like = maker_like("randn_like", function(x) op.normal_(x) end)
function M.full_like(x, value, options)
  local y, o = new_like("full_like", x, options)
  return finish(op.fill_(y, value), o)
end
methods.full_like = M.full_like

-- A 0-dim tensor beside `like` (f32 on the CPU without one).
function ops.scalar_like(value, like)
  local x = new("tensor", 0, like and C.lc_dtype_of(like) or F32, like and C.lc_device_of(like) or 0)
  return op.fill_(x, value)
end

-- ---- Lua values to tensors and back -------------------------------------------------------------------------------
-- The shape of a nested table, by its first elements.
local function shape_of(value)
  local shape = {}
  while type(value) == "table" do
    shape[#shape + 1] = #value
    value = value[1]
  end
  return shape
end

local function ragged(path, wanted, got)
  bridge.fail("tensor: the table is not rectangular: element [%s] %s, %s expected", table.concat(path, "]["), got,
              wanted)
end

local function read_nested(value, shape, level, buffer, at, path)
  local n = shape[level]
  if n == nil then
    if type(value) == "boolean" then value = value and 1 or 0 end
    if type(value) ~= "number" then ragged(path, "a number", "is a " .. type(value)) end
    buffer[at] = value
    return at + 1
  end
  if type(value) ~= "table" then ragged(path, "a table of " .. n, "is a " .. type(value)) end
  if #value ~= n then ragged(path, n, ("has %d elements"):format(#value)) end
  if shape[level + 1] == nil then -- the innermost row, without recursion
    for i = 1, n do
      local v = value[i]
      if type(v) == "boolean" then v = v and 1 or 0 end
      if type(v) ~= "number" then
        path[level] = i
        ragged(path, "a number", "is a " .. type(v))
      end
      buffer[at + i - 1] = v
    end
    return at + n
  end
  for i = 1, n do
    path[level] = i
    at = read_nested(value[i], shape, level + 1, buffer, at, path)
    path[level] = nil
  end
  return at
end

-- lc.tensor(number | nested table | tensor, {dtype =, device =}): a copy.
function M.tensor(value, options)
  local o = read_options("tensor", options)
  if is_tensor(value) then
    local x = o.dtype or o.device
      and op.to(value, o.dtype and dtype_id(o.dtype) or C.lc_dtype_of(value),
                o.device and device_id(o.device) or C.lc_device_of(value))
      or op.clone(value)
    return finish(methods.detach(x), o)
  end
  if type(value) ~= "number" and type(value) ~= "table" and type(value) ~= "boolean" then
    bridge.fail("tensor: a number or a nested table of numbers is needed; got %s", type(value))
  end
  local dtype = dtype_id(o.dtype)
  local host = (dtype == BF16 or dtype == F16) and F32 or dtype
  if not host_type[host] then bridge.fail("tensor: quantised tensors come from files only") end
  local shape = shape_of(value)
  if #shape > 6 then bridge.fail("tensor: at most 6 dims; the table nests %d deep", #shape) end
  local count = 1
  for d = 1, #shape do count = count * shape[d] end
  local buffer = ffi.new(host_type[host] .. "[?]", math.max(1, count))
  read_nested(value, shape, 1, buffer, 0, {})
  for d = 1, #shape do dims_buffer[d - 1] = shape[d] end
  local x = handle()
  try("tensor", C.lc_from_host, x, host, device_id(o.device), #shape, dims_buffer, buffer)
  x = adopt(x)
  if host ~= dtype then x = op.to(x, dtype, C.lc_device_of(x)) end
  return finish(x, o)
end

-- From host memory that C filled (ids of a tokenizer, rows of a file): copies count values.
function M.from_pointer(pointer, shape, dtype, device)
  for d = 1, #shape do dims_buffer[d - 1] = shape[d] end
  local x = handle()
  try("tensor", C.lc_from_host, x, dtype_id(dtype), device_id(device), #shape, dims_buffer, pointer)
  return adopt(x)
end

-- The elements, row-major, in a fresh host array: array, count.
local function to_host(x)
  local dtype = C.lc_dtype_of(x)
  ndim_of(x)
  if dtype == BF16 or dtype == F16 or not host_type[dtype] then
    x = op.to(methods.detach(x), F32, C.lc_device_of(x))
    dtype = F32
  end
  local count = C.lc_numel(x)
  local buffer = ffi.new(host_type[dtype] .. "[?]", math.max(1, count))
  check(C.lc_to_host(x, buffer, C.lc_dtype_bytes(dtype, count)), "totable")
  return buffer, count
end
M.to_host = to_host

local function nest(buffer, shape, level, at)
  local out, n = {}, shape[level]
  if level == #shape then
    for i = 1, n do out[i] = tonumber(buffer[at + i - 1]) end
    return out, at + n
  end
  for i = 1, n do out[i], at = nest(buffer, shape, level + 1, at) end
  return out, at
end

function methods.totable(x)
  local buffer = to_host(x)
  local shape = fields.shape(x)
  if #shape == 0 then return tonumber(buffer[0]) end
  return (nest(buffer, shape, 1, 0))
end

local item_out = ffi.new("double[1]")
function methods.item(x)
  check(C.lc_item(x, item_out), "item")
  return item_out[0]
end

-- The host address of a contiguous CPU tensor, typed; valid as long as the tensor lives.
function methods.data(x)
  ndim_of(x)
  local p = C.lc_data(x)
  if p == nil then bridge.fail("data: the tensor is on %s; x:cpu() first", fields.device(x)) end
  if C.lc_is_contiguous(x) == 0 then bridge.fail("data: the tensor is a strided view; x:contiguous() first") end
  local kind = host_type[C.lc_dtype_of(x)] or "uint8_t"
  return ffi.cast(kind .. " *", p)
end

-- ---- dtype, device, copies ----------------------------------------------------------------------------------------
local function convert(x, dtype, device)
  if dtype == C.lc_dtype_of(x) and device == C.lc_device_of(x) then return x end
  return op.to(x, dtype, device)
end

-- x:to("bf16"), x:to("cuda:0"), x:to("cuda:0", "bf16"), x:to{dtype =, device =}, x:to(like)
function methods.to(x, a, b)
  if not is_tensor(x) then bridge.fail("to: a tensor is needed; got %s", type(x)) end
  ndim_of(x)
  local dtype, device = C.lc_dtype_of(x), C.lc_device_of(x)
  if is_tensor(a) then return convert(x, C.lc_dtype_of(a), C.lc_device_of(a)) end
  if type(a) == "table" then
    for key in pairs(a) do
      if key ~= "dtype" and key ~= "device" then
        bridge.fail("to: no option '%s'; options are dtype, device", tostring(key))
      end
    end
    return convert(x, a.dtype and dtype_id(a.dtype) or dtype, a.device and device_id(a.device) or device)
  end
  for i = 1, 2 do
    local word = i == 1 and a or b
    if i == 1 and type(word) ~= "string" then
      bridge.fail("to: a dtype or a device is needed, like \"bf16\" or \"cuda:0\"")
    end
    if word ~= nil then
      local id = C.lc_dtype_id(word)
      if id >= 0 then
        dtype = id
      elseif word:match("^%a+:?%d*$") and (word == "cpu" or word:find(":") or word == "cuda") then
        device = device_id(word)
      else
        bridge.fail("to: '%s' is neither a dtype (f32 bf16 f16 f64 i32 i64 u8) nor a device (cpu cuda:0)", word)
      end
    end
  end
  return convert(x, dtype, device)
end
M.to = methods.to

for name, id in pairs {float = F32, double = F64, half = F16, bfloat16 = BF16, int = I32, long = I64, byte = U8} do
  methods[name] = function(x)
    ndim_of(x)
    return convert(x, id, C.lc_device_of(x))
  end
end
function methods.cpu(x)
  ndim_of(x)
  return convert(x, C.lc_dtype_of(x), 0)
end
function methods.contiguous(x)
  ndim_of(x)
  if C.lc_is_contiguous(x) ~= 0 then return x end
  return op.clone(x)
end

function methods.detach(x)
  local y = handle()
  check(C.lc_detach(y, x), "detach")
  return adopt(y)
end

-- A new handle for the same data, without history.
function methods.alias(x)
  local y = handle()
  check(C.lc_alias(y, x), "alias")
  return adopt(y)
end

-- x becomes a view of from's storage (same shape and dtype): flat parameter buffers.
function methods.set_data(x, from)
  check(C.lc_set_data(x, from), "set_data")
  return x
end

-- ---- indexing -----------------------------------------------------------------------------------------------------
local function wrong_position(name, i, d, n)
  bridge.raise("EARG", name,
               ("%s: position %s of dim %d, which has %d; positions count from 1, or from the end with -1")
    :format(name, tostring(i), d + 1, n))
end

local raw_select, raw_slice = op.select, op.slice

-- Position i of dim d (0-based d): the dim goes.
local function take(x, d, i)
  local n = C.lc_dim(x, d)
  if type(i) ~= "number" or floor(i) ~= i or i == 0 or i > n or i < -n then wrong_position("select", i, d, n) end
  return raw_select(x, d + 1, i > 0 and i - 1 or n + i)
end

function methods.select(x, d, i) return take(x, dim_index(x, d, "select"), i) end

-- Positions first .. last of dim d, both included; last nil: to the end. first = last + 1 is an empty slice.
local function cut(x, d, first, last, step)
  local n = C.lc_dim(x, d)
  first, last, step = first == nil and 1 or first, last == nil and -1 or last, step == nil and 1 or step
  if type(first) ~= "number" or type(last) ~= "number" or floor(first) ~= first or floor(last) ~= last then
    bridge.raise("EARG", "slice", "slice: first and last must be integers")
  end
  if type(step) ~= "number" or step < 1 or floor(step) ~= step then
    bridge.raise("EARG", "slice", "slice: step must be an integer from 1; got " .. tostring(step))
  end
  local from, to = first < 0 and n + first + 1 or first, last < 0 and n + last + 1 or last
  if from < 1 or from > n + 1 or to < from - 1 or to > n then
    bridge.raise("EARG", "slice",
                 ("slice: positions %d to %d of dim %d, which has %d; positions count from 1, both ends included")
      :format(first, last, d + 1, n))
  end
  return raw_slice(x, d + 1, from - 1, to, step)
end

function methods.slice(x, d, first, last, step)
  if type(d) == "table" then d, first, last, step = d.dim, d.first, d.last, d.step end
  return cut(x, dim_index(x, d, "slice"), first, last, step)
end

function methods.narrow(x, d, start, length)
  local k = dim_index(x, d, "narrow")
  local n = C.lc_dim(x, k)
  if type(start) ~= "number" or type(length) ~= "number" then
    bridge.fail("narrow: start and length must be integers")
  end
  local from = start < 0 and n + start + 1 or start
  if from < 1 or length < 0 or from + length - 1 > n then
    bridge.raise("EARG", "narrow", ("narrow: %d positions from %d of dim %d, which has %d"):format(length, start,
                                                                                                   k + 1, n))
  end
  return raw_slice(x, k + 1, from - 1, from - 1 + length, 1)
end

-- x[{ {1, 3}, -1, {}, ids }]: a slice, a position, all, rows by an integer tensor.
local function multi_index(x, spec)
  local d, n = 0, ndim_of(x)
  if #spec > n then bridge.fail("index: %d entries for a tensor with %d dims", #spec, n) end
  for k = 1, #spec do
    local s = spec[k]
    if type(s) == "number" then
      x = take(x, d, s)
    else
      if is_tensor(s) then
        x = op.index_select(x, d + 1, s)
      elseif type(s) == "table" then
        if s[1] ~= nil then x = cut(x, d, s[1], s[2], s[3]) end
      elseif s ~= "all" then
        bridge.fail("index: entry %d is a %s; entries are positions, {first, last[, step]}, {} or integer tensors", k,
                    type(s))
      end
      d = d + 1
    end
  end
  return x
end

function bridge.index(x, key)
  if type(key) == "number" then
    if ndim_of(x) == 0 then bridge.fail("a tensor without dims cannot be indexed; its value is x:item()") end
    return take(x, 0, key)
  elseif type(key) == "table" then
    return multi_index(x, key)
  elseif type(key) == "cdata" and is_tensor(key) then
    return op.index_select(x, 1, key)
  elseif type(key) == "string" and key:sub(1, 1) == "_" then
    return nil
  end
  local near = type(key) == "string" and bridge.nearest(key, methods, fields)
  bridge.fail("tensors have no method or field '%s'%s", tostring(key),
              near and (" (did you mean '%s'?)"):format(near) or "")
end

local function assign(view, value)
  if type(value) == "number" then
    op.fill_(view, value)
  else
    op.copy_(view, is_tensor(value) and value or M.tensor(value, {dtype = fields.dtype(view)}))
  end
end

function meta.__newindex(x, key, value)
  if type(key) == "number" or type(key) == "table" or is_tensor(key) then
    if is_tensor(key) then bridge.fail("x[ids] = v is not offered; see x:scatter_add") end
    assign(bridge.index(x, key), value)
  elseif key == "grad" then
    methods.set_grad(x, value)
  elseif key == "name" then
    methods.set_name(x, value)
  elseif key == "requires_grad" then
    check(C.lc_require_grad(x, value and 1 or 0), "requires_grad")
  else
    bridge.fail("tensors have no field '%s' to set", tostring(key))
  end
end

-- ---- operators ----------------------------------------------------------------------------------------------------
local istype = ffi.istype
local affine, add, sub, mul, div = op.affine, op.add, op.sub, op.mul, op.div

local function operand(name, a, b)
  local bad = a
  if is_tensor(a) then bad = b end
  bridge.fail("%s: a tensor and %s; the other side must be a tensor or a number", name,
              bad == nil and "nil" or "a " .. type(bad))
end

function meta.__add(a, b)
  if istype(handle, a) and istype(handle, b) then return add(a, b) end
  if type(b) == "number" then return affine(a, 1, b) end
  if type(a) == "number" then return affine(b, 1, a) end
  operand("+", a, b)
end

function meta.__sub(a, b)
  if istype(handle, a) and istype(handle, b) then return sub(a, b) end
  if type(b) == "number" then return affine(a, 1, -b) end
  if type(a) == "number" then return affine(b, -1, a) end
  operand("-", a, b)
end

function meta.__mul(a, b)
  if istype(handle, a) and istype(handle, b) then return mul(a, b) end
  if type(b) == "number" then return affine(a, b, 0) end
  if type(a) == "number" then return affine(b, a, 0) end
  operand("*", a, b)
end

function meta.__div(a, b)
  if istype(handle, a) and istype(handle, b) then return div(a, b) end
  if type(b) == "number" then return affine(a, 1 / b, 0) end
  if type(a) == "number" then
    local r = op.reciprocal(b)
    return a == 1 and r or affine(r, a, 0)
  end
  operand("/", a, b)
end

function meta.__pow(a, b)
  if istype(handle, a) and istype(handle, b) then return op.pow(a, b) end
  if type(b) == "number" then return op.pow_scalar(a, b) end
  if type(a) == "number" then return op.pow(ops.scalar_like(a, b), b) end
  operand("^", a, b)
end

meta.__unm = function(x) return op.neg(x) end
function meta.__len(x)
  if ndim_of(x) == 0 then return 0 end
  return C.lc_dim(x, 0)
end

-- Identity: the same tensor object, not equal elements.
function meta.__eq(a, b)
  return istype(handle, a) and istype(handle, b) and a._slot == b._slot and a._gen == b._gen
end
function meta.__lt() bridge.fail("tensors have no order: use a:lt(b) or a:gt(b) for an elementwise comparison") end
function meta.__le() bridge.fail("tensors have no order: use a:le(b) or a:ge(b) for an elementwise comparison") end
function meta.__concat() bridge.fail("tensors are joined by lc.cat({a, b}, dim); tostring(x) makes text") end
function meta.__mod() bridge.fail("% is not offered for tensors") end
function meta.__call() bridge.fail("a tensor is not a function; x[i] indexes") end

-- What a number as second operand means, where a cheaper op says the same.
local short = ops.short_forms
function short.add(x, n) return affine(x, 1, n) end
function short.sub(x, n) return affine(x, 1, -n) end
function short.mul(x, n) return affine(x, n, 0) end
function short.div(x, n) return affine(x, 1 / n, 0) end
function short.pow(x, n) return op.pow_scalar(x, n) end
function short.maximum(x, n) return op.clamp(x, n, math.huge) end
function short.minimum(x, n) return op.clamp(x, -math.huge, n) end
function short.add_(x, n) return op.add_(x, ops.scalar_like(n, x)) end
function short.copy_(x, n) return op.fill_(x, n) end

-- ---- compositions -------------------------------------------------------------------------------------------------
function M.cat(list, d)
  if type(d) == "table" then d = d.dim end
  return op.cat(list, d or 1)
end

function M.stack(list, d)
  if type(d) == "table" then d = d.dim end
  d = d or 1
  if type(list) ~= "table" or not is_tensor(list[1]) then bridge.fail("stack: a list of tensors is needed") end
  local parts = {}
  for i = 1, #list do parts[i] = op.unsqueeze(list[i], d) end
  return op.cat(parts, d)
end

-- Pieces of `size` (the last may be shorter), or of the sizes listed.
function methods.split(x, size, d)
  d = d or 1
  local n = C.lc_dim(x, dim_index(x, d, "split"))
  local parts, at = {}, 1
  if type(size) == "table" then
    for i, s in ipairs(size) do
      parts[i] = methods.narrow(x, d, at, s)
      at = at + s
    end
    if at ~= n + 1 then bridge.fail("split: the sizes add up to %d, dim %d has %d", at - 1, d, n) end
    return parts
  end
  if type(size) ~= "number" or size < 1 or floor(size) ~= size then
    bridge.fail("split: size must be an integer from 1, or a list")
  end
  while at <= n do
    parts[#parts + 1] = methods.narrow(x, d, at, math.min(size, n - at + 1))
    at = at + size
  end
  return parts
end

function methods.chunk(x, count, d)
  if type(count) ~= "number" or count < 1 then bridge.fail("chunk: the number of pieces must be an integer from 1") end
  local n = C.lc_dim(x, dim_index(x, d or 1, "chunk"))
  return methods.split(x, math.max(1, math.ceil(n / count)), d)
end

methods.view = op.reshape
methods.mm, methods.bmm = op.matmul, op.matmul
function methods.t(x)
  if ndim_of(x) ~= 2 then bridge.fail("t: a matrix is needed; this tensor has %d dims", ndim_of(x)) end
  return op.transpose(x, 1, 2)
end

-- Dims first .. last become one.
function methods.flatten(x, first, last)
  if ndim_of(x) == 0 then return op.reshape(x, 1) end
  local a, b = dim_index(x, first or 1, "flatten"), dim_index(x, last or -1, "flatten")
  local shape = {}
  for d = 0, ndim_of(x) - 1 do
    if d > a and d <= b then
      shape[#shape] = shape[#shape] * C.lc_dim(x, d)
    else
      shape[#shape + 1] = C.lc_dim(x, d)
    end
  end
  return op.reshape(x, shape)
end

local raw_squeeze = op.squeeze
-- One dim, or all dims of size 1.
function methods.squeeze(x, d)
  if d ~= nil then return raw_squeeze(x, d) end
  local shape = {}
  for k = 0, ndim_of(x) - 1 do
    if C.lc_dim(x, k) ~= 1 then shape[#shape + 1] = C.lc_dim(x, k) end
  end
  return op.reshape(x, shape)
end

function methods.expand_as(x, y) return op.expand(x, fields.shape(y)) end
function methods.reshape_as(x, y) return op.reshape(x, fields.shape(y)) end
function methods.zero_(x) return op.fill_(x, 0) end
function methods.norm(x) return op.sqrt(op.sum(op.square(x))) end
function methods.var(x, d, options)
  local keep = type(options) == "table" and options.keep or options == true
  local centred = x - op.mean(x, d, true)
  return op.mean(op.square(centred), d, keep)
end
function methods.std(x, d, options) return op.sqrt(methods.var(x, d, options)) end

-- The same elements, in the same order, within a tolerance relative to the larger of 1 and the largest entry.
function methods.allclose(x, y, tolerance)
  tolerance = tolerance or 1e-5
  local a, n = to_host(x)
  local b, m = to_host(y)
  if n ~= m then return false, math.huge end
  local worst, scale = 0, 1
  for i = 0, n - 1 do
    local u, v = tonumber(a[i]), tonumber(b[i])
    local e = u == v and 0 or math.abs(u - v)
    if e ~= e then return false, e end
    if e > worst then worst = e end
    if math.abs(v) > scale then scale = math.abs(v) end
  end
  return worst <= tolerance * scale, worst / scale
end

-- ---- gradients of a leaf ------------------------------------------------------------------------------------------
function methods.requires_grad_(x, on)
  check(C.lc_require_grad(x, on == false and 0 or 1), "requires_grad_")
  return x
end

function methods.set_grad(x, g)
  check(C.lc_set_grad(x, g), "set_grad")
  return x
end

function methods.zero_grad(x)
  check(C.lc_set_grad(x, nil), "zero_grad")
  return x
end

-- Everything that is a function of a tensor is also lc.NAME.
M.names = {"select", "slice", "narrow", "split", "chunk", "view", "flatten", "squeeze", "t", "expand_as", "norm",
           "var", "std",
           "allclose", "detach", "set_data", "set_grad"}
for _, name in ipairs(M.names) do M[name] = methods[name] end

return M
