-- The one bridge to C: declares the public header, finds the symbols, turns a status into a raised error object with the user's
-- line, and holds what every other core module shares: the handle type, the one call record, the scope depth. Knows no op.
local ffi = require "ffi"
local M = {ffi = ffi}

-- ---- the header -------------------------------------------------------------------------------------------------------
local function header_text()
  local ok, text = pcall(require, "lolcats.header")
  if ok and type(text) == "string" then return text end
  local here = debug.getinfo(1, "S").source:match("^@(.-)lua/lolcats/core/ffi%.lua$") or ""
  local file = assert(io.open(here .. "runtime/lolcats.h"), "lolcats: neither the module lolcats.header nor runtime/lolcats.h found")
  text = file:read("*a")
  file:close()
  return (text:match("/%*<ffi>%*/(.-)/%*</ffi>%*/"))
end
ffi.cdef(header_text())

local library = os.getenv("LOLCATS_LIB")
local C = library and library ~= "" and ffi.load(library) or ffi.C
M.C = C

-- ---- what the core modules share --------------------------------------------------------------------------------------
-- `methods` answers x.name for what is a function, `fields` computes x.name for what is a value; tensor.lua fills both.
local meta = {}
M.meta, M.methods, M.fields = meta, {}, {}
do
  local methods, fields, indexer = M.methods, M.fields, M
  function meta.__index(x, key)
    local found = methods[key]
    if found ~= nil then return found end
    local field = fields[key]
    if field ~= nil then return field(x) end
    return indexer.index(x, key)
  end
end
local handle = ffi.metatype("lc_handle", meta)
M.handle = handle
M.args = ffi.new("lc_args")
M.X = ffi.cast("uint32_t *", M.args.x) -- inputs and results as plain integers: slot, generation, slot, ...
M.Y = ffi.cast("uint32_t *", M.args.y)
M.I = ffi.cast("int32_t *", M.args.i)
M.F = ffi.cast("double *", M.args.f)
M.depth = ffi.new("int32_t[1]")        -- the scope depth, as C counts it; scope.lua keeps it

local istype = ffi.istype
function M.is_tensor(v) return istype(handle, v) end

-- ---- errors -----------------------------------------------------------------------------------------------------------
local Error = {}
Error.__index = Error
function Error:__tostring()
  local text = self.message
  if self.op and text:sub(1, #self.op) ~= self.op then text = self.op .. ": " .. text end
  if self.where then text = self.where .. ": " .. text end
  if self.traceback then text = text .. "\n" .. self.traceback end
  return text
end
M.Error = Error
function M.is_error(v) return getmetatable(v) == Error end

local function is_inside(source)
  return source:find("lua/lolcats/", 1, true) ~= nil or source:find("=lolcats", 1, true) == 1
end

-- "file:line" of the first frame that is not the library's; the outermost Lua frame when all are.
local function user_place(level)
  local last
  while true do
    local info = debug.getinfo(level, "Sl")
    if not info then return last end
    if info.what ~= "C" and info.currentline >= 0 then
      local name = info.source:sub(1, 1) == "@" and info.source:sub(2) or info.short_src
      last = name .. ":" .. info.currentline
      if not is_inside(info.source) then return last end
    end
    level = level + 1
  end
end
M.user_place = user_place

local trace_all = os.getenv("LOLCATS_TRACE") == "full"
local function raise(code, op, message)
  error(setmetatable({code = code, op = op, message = message, where = user_place(3),
                      traceback = trace_all and debug.traceback("", 3) or nil}, Error), 0)
end
M.raise = raise

-- A usage error: the caller asked for something that cannot be.
function M.fail(format, ...)
  raise("EARG", nil, select("#", ...) > 0 and format:format(...) or format)
end

local function code_of(status) return (ffi.string(C.lc_status_name(status)):gsub("^LC_", "")) end

local function raise_status(status, op)
  if status == C.LC_EINTR then C.lc_interrupt = 0 end -- answered: what cleans up may call ops again
  return raise(code_of(status), op, ffi.string(C.lc_error_message()))
end
M.raise_status = raise_status

-- Raises when status is not LC_OK; `op` names the function that the user called.
function M.check(status, op)
  if status ~= 0 then raise_status(status, op) end
end

-- ---- memory -----------------------------------------------------------------------------------------------------------
local ENOMEM = C.LC_ENOMEM

-- Runs the finalisers of tensors that nobody names any more, then gives cached blocks back.
local function reclaim()
  collectgarbage()
  collectgarbage()
  for device = 0, C.lc_device_count() - 1 do C.lc_trim(device) end
end
M.reclaim = reclaim

-- Calls f(...), once more after a collection when memory was short, and raises what remains.
function M.try(op, f, ...)
  local status = f(...)
  if status == ENOMEM then
    reclaim()
    status = f(...)
  end
  if status ~= 0 then raise_status(status, op) end
end

-- The binder's slow exit: lc_call failed, the record still holds the inputs.
function M.call_failed(status, id, op)
  if status == ENOMEM then
    reclaim()
    status = C.lc_call(id, M.args)
  end
  if status ~= 0 then raise_status(status, op) end
end

-- A new handle at depth 0 belongs to the collector, which does not see what hangs on it: past the debt, a full collection.
local debt_limit, drop, gc = 256 * 2 ^ 20, C.lc_drop, ffi.gc
local depth = M.depth
function M.set_debt_limit(bytes) debt_limit = bytes end
local function own(h)
  gc(h, drop)
  if C.lc_debt > debt_limit then
    C.lc_debt = 0
    collectgarbage()
  end
  return h
end
M.own = own

-- What a function that filled `h` through a pointer hands on.
function M.adopt(h)
  if depth[0] == 0 then return own(h) end
  return h
end

-- For a function of C that answers a stale handle with -1: the message stands already.
function M.stale(op) raise("ESTALE", op, ffi.string(C.lc_error_message())) end

-- ---- suggestions ------------------------------------------------------------------------------------------------------
local function distance(a, b)
  local row = {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local diagonal = row[0]
    row[0] = i
    for j = 1, #b do
      local cost = a:byte(i) == b:byte(j) and diagonal or diagonal + 1
      diagonal = row[j]
      row[j] = math.min(cost, row[j] + 1, row[j - 1] + 1)
    end
  end
  return row[#b]
end

-- The nearest of the keys of some tables to a mistyped name, or nil.
function M.nearest(name, ...)
  local best, best_distance = nil, math.max(1, math.floor(#name / 3)) + 1
  for i = 1, select("#", ...) do
    for key in pairs((select(i, ...))) do
      if type(key) == "string" and math.abs(#key - #name) < best_distance then
        local d = distance(name, key)
        if d < best_distance or (d == best_distance and best and key < best) then best, best_distance = key, d end
      end
    end
  end
  return best
end

return M
