-- The op table as Lua functions: reads every row of runtime/ops.def through lc_op_*, and writes for each a Lua function
-- of fixed shape that checks kinds, fills the one call record and calls C. No closure, varargs or table on the way of a
-- plain call; options tables, numbers in place of tensors and errors take the slow exit at the end of this file.
local bridge = require "lolcats.core.ffi"
local ffi, C = bridge.ffi, bridge.C
local M = {list = {}, by_name = {}, functions = {}}

-- ---- reading a row ------------------------------------------------------------------------------------------------
local FLAGS = {"point", "binary", "compare", "view", "inplace", "nograd", "nondiff", "random", "mixed", "internal",
               "grad"}

local function read_default(kind, text)
  if not text then return nil end
  if kind == "b" then return text == "true" end
  if text == "inf" then return math.huge elseif text == "-inf" then return -math.huge end
  return assert(tonumber(text), text)
end

-- "x:T alpha:f=1 -> T" -> params {name, kind, optional, default, choices, x, f, i: places in the record}, visible
-- results
local function read_signature(op)
  local left, right = op.signature:match("^(.-)%s*%->%s*(.-)%s*$")
  op.params, op.place, op.results = {}, {}, 0
  local nx, nf, ni = 0, 0, 0
  for word in left:gmatch("%S+") do
    local name, kind, absent, default = word:match("^([%w_]+):(%a)(%??)=?(.*)$")
    local p = {name = name, kind = kind, optional = absent == "?"}
    if kind == "e" then
      p.choices, p.names = {}, {}
      for choice in default:gmatch("[^|]+") do
        p.choices[choice], p.names[#p.names + 1] = #p.names, choice
      end
      p.default = p.names[1]
    elseif default ~= "" then
      p.default = read_default(kind, default)
    end
    if ("TIA"):find(kind) then p.x, nx = nx, nx + 1 end
    if ("fF"):find(kind) then p.f, nf = nf, nf + 1 end
    if ("ibdeN"):find(kind) then p.i, ni = ni, ni + 1 end
    if ("SD"):find(kind) then p.i, ni = ni, ni + 7 end
    op.params[#op.params + 1] = p
    op.place[name] = #op.params
  end
  for _, p in ipairs(op.params) do -- inputs that may be scalars stand after all others
    if p.kind == "F" or p.kind == "N" then p.x, nx = nx, nx + 1 end
  end
  for word in right:gmatch("%S+") do
    if word:sub(1, 1) ~= "+" then op.results = op.results + 1 end
  end
  local last = op.params[#op.params]
  op.spread = last ~= nil and (last.kind == "S" or last.kind == "D") -- reshape(x, 2, 3): the list may be written out
end

local function show_default(p)
  if p.default == nil then return p.optional and p.name .. "=nil" or p.name end
  if p.kind == "e" then return p.name .. '="' .. p.default .. '"' end
  return p.name .. "=" .. tostring(p.default)
end

-- "softmax(x, dim=-1)"
local function usage(op)
  local parts = {}
  for k, p in ipairs(op.params) do
    parts[k] = show_default(p) .. ((op.spread and k == #op.params) and "..." or "")
  end
  return op.name .. "(" .. table.concat(parts, ", ") .. ")"
end

local function read_row(id)
  local op = {id = id, name = ffi.string(C.lc_op_name(id)), signature = ffi.string(C.lc_op_signature(id)),
              doc = ffi.string(C.lc_op_doc(id)), has = {}}
  for _, flag in ipairs(FLAGS) do op.has[flag] = C.lc_op_has(id, flag) ~= 0 end
  read_signature(op)
  op.usage = usage(op)
  return op
end

-- ---- writing a function -------------------------------------------------------------------------------------------
-- Each writer adds to `check` (phase 1: may leave by `cold`, touches nothing) and `fill` (phase 2: stores into the
-- record).
local writers = {}

local function tensor_fill(w, p, v)
  w.fill(("X[%d], X[%d] = %s._slot, %s._gen"):format(2 * p.x, 2 * p.x + 1, v, v))
end

function writers.T(w, p, v)
  if p.optional then
    w.check(("if %s ~= nil and not istype(H, %s) then return cold(%s) end"):format(v, v, w.all))
    w.fill(("if %s ~= nil then X[%d], X[%d] = %s._slot, %s._gen else X[%d] = 0 end")
      :format(v, 2 * p.x, 2 * p.x + 1, v, v, 2 * p.x + 1))
  else
    w.check(("if not istype(H, %s) then return cold(%s) end"):format(v, w.all))
    tensor_fill(w, p, v)
  end
end
writers.I, writers.A = writers.T, writers.T

local function number_check(w, p, v, extra)
  if p.default ~= nil then
    w.check(("if %s == nil then %s = %s"):format(v, v, ("%.17g"):format(p.default):gsub("inf", "huge")))
    w.check(("elseif type(%s) ~= 'number'%s then return cold(%s) end"):format(v, extra or "", w.all))
  else
    w.check(("if type(%s) ~= 'number'%s then return cold(%s) end"):format(v, extra or "", w.all))
  end
end
local function whole(v) return (" or floor(%s) ~= %s"):format(v, v) end

function writers.f(w, p, v)
  number_check(w, p, v)
  w.fill(("F[%d] = %s"):format(p.f, v))
end

function writers.i(w, p, v)
  number_check(w, p, v, whole(v))
  w.fill(("I[%d] = %s"):format(p.i, v))
end

function writers.d(w, p, v)
  number_check(w, p, v, whole(v) .. (" or %s == 0"):format(v))
  w.fill(("I[%d] = %s"):format(p.i, w.dim(v)))
end

function writers.b(w, p, v)
  if p.default ~= nil then
    w.check(("if %s == nil then %s = %s end"):format(v, v, tostring(p.default)))
  end
  w.check(("if type(%s) ~= 'boolean' then return cold(%s) end"):format(v, w.all))
  w.fill(("I[%d] = %s and 1 or 0"):format(p.i, v))
end

function writers.e(w, p, v)
  local name = w.upvalue(p.choices)
  w.check(("local c%s = 0 if %s ~= nil then c%s = %s[%s] if c%s == nil then return cold(%s) end end")
    :format(v, v, v, name, v, v, w.all))
  w.fill(("I[%d] = c%s"):format(p.i, v))
end

function writers.s(w, p, v)
  w.check(("if type(%s) ~= 'string' then return cold(%s) end"):format(v, w.all))
  w.fill(("args.s = %s"):format(v))
end

-- A number, or a 0-dim tensor that is read when the kernel runs.
local function real_or_tensor(w, p, v, store)
  w.check(("if %s == nil then return cold(%s) end"):format(v, w.all))
  w.check(("if type(%s) ~= 'number' and not istype(H, %s) then return cold(%s) end"):format(v, v, w.all))
  w.fill(("if type(%s) == 'number' then %s = %s X[%d] = 0 else X[%d], X[%d] = %s._slot, %s._gen end")
    :format(v, store, v, 2 * p.x + 1, 2 * p.x, 2 * p.x + 1, v, v))
end
function writers.F(w, p, v) real_or_tensor(w, p, v, ("F[%d]"):format(p.f)) end
function writers.N(w, p, v) real_or_tensor(w, p, v, ("I[%d]"):format(p.i)) end

function writers.L(w, p, v)
  w.check(("if type(%s) ~= 'table' or %s[1] == nil or not all_tensors(%s) then return cold(%s) end")
    :format(v, v, v, w.all))
  w.fill(("fill_list(%s)"):format(v))
end

-- A list of integers: sizes, or dims (convert): a table, a number, nothing, or (as the last parameter) the numbers one
-- after the other.
local function list_writer(w, p, v, convert)
  local others = {}
  for _, q in ipairs(w.op.params) do
    if q ~= p and not q.x then others[#others + 1] = (" or %s.%s ~= nil"):format(v, q.name) end
  end
  w.check(("if type(%s) == 'table' then if not all_whole(%s, %s)%s then return cold(%s) end")
    :format(v, v, convert and "true" or "false", table.concat(others), w.all))
  local bad = convert and " or %s == 0" or ""
  if w.op.spread then
    for j, u in ipairs(w.rest) do
      local condition = ("type(%s) ~= 'number' or floor(%s) ~= %s" .. bad:format(u)):format(u, u, u)
      if j == 1 then
        w.check(("elseif %s then return cold(%s)"):format(condition, w.all))
      else
        w.check(("elseif %s ~= nil and (%s) then return cold(%s)"):format(u, condition, w.all))
      end
    end
    w.check("end")
  else
    w.check(("elseif %s ~= nil and (type(%s) ~= 'number' or floor(%s) ~= %s%s) then return cold(%s) end")
      :format(v, v, v, v, bad:format(v), w.all))
  end
  local function store(u) return convert and w.dim(u) or u end
  w.fill(("if type(%s) == 'table' then fill_whole(%d, %s, %s, %q)")
    :format(v, p.i, v, convert and "p1" or "nil", w.op.name))
  if w.op.spread then
    for j = #w.rest, 1, -1 do
      w.fill(("elseif %s ~= nil then I[%d] = %d"):format(w.rest[j], p.i, j))
      for i = 1, j do
        w.fill(("I[%d] = %s"):format(p.i + i, store(w.rest[i])))
      end
    end
    w.fill("end")
  else
    w.fill(("elseif %s == nil then I[%d] = 0"):format(v, p.i))
    w.fill(("else I[%d], I[%d] = 1, %s end"):format(p.i, p.i + 1, store(v)))
  end
end
function writers.S(w, p, v) list_writer(w, p, v, false) end
function writers.D(w, p, v) list_writer(w, p, v, true) end

local PRELUDE = [[
local env, up = ...
local C, H, X, Y, F, I, args, depth = env.C, env.H, env.X, env.Y, env.F, env.I, env.args, env.depth
local istype, type, floor, huge, own, failed = env.istype, env.type, env.floor, env.huge, env.own, env.failed
local all_tensors, fill_list, all_whole, fill_whole = env.all_tensors, env.fill_list, env.all_whole, env.fill_whole
local from_end = env.from_end
local cold = up.cold
]]

local function write_results(op)
  if op.has.inplace or op.results == 0 then return "return p1" end
  local made, names = {}, {}
  for r = 1, op.results do
    made[r] = ("local h%d = H(Y[%d], Y[%d])"):format(r, 2 * r - 2, 2 * r - 1)
    names[r] = "h" .. r
  end
  local owned = {}
  for r = 1, op.results do owned[r] = "own(" .. names[r] .. ")" end
  return table.concat(made, " ") .. "\nif depth[0] == 0 then return " .. table.concat(owned, ", ") .. " end\nreturn "
    .. table.concat(names, ", ")
end

local function write_function(op)
  local checks, fills, up = {}, {}, {}
  local names, rest = {}, {}
  for k in ipairs(op.params) do names[k] = "p" .. k end
  if op.spread then
    rest[1] = names[#names]
    for j = 2, 6 do
      rest[j] = "p" .. (#op.params + j - 1)
      names[#names + 1] = rest[j]
    end
  end
  names[#names + 1] = "extra"
  local head, extra_ups = table.concat(names, ", "), {}
  local w = {op = op, all = head, rest = rest,
             check = function(text) checks[#checks + 1] = text end,
             fill = function(text) fills[#fills + 1] = text end,
             dim = function(v) -- text of a dim from 0
               local x = op.params[1].kind == "L" and "p1[1]" or "p1"
               return ("%s > 0 and %s - 1 or from_end(%s, %s, %q)"):format(v, v, x, v, op.name)
             end,
             upvalue = function(value)
               up[#up + 1] = value
               extra_ups[#extra_ups + 1] = ("local u%d = up[%d]"):format(#up, #up)
               return "u" .. #up
             end}
  for k, p in ipairs(op.params) do writers[p.kind](w, p, "p" .. k) end
  w.check(("if extra ~= nil then return cold(%s) end"):format(head))
  local text = table.concat({
    PRELUDE, table.concat(extra_ups, "\n"), ("return function(%s)"):format(head), table.concat(checks, "\n"),
    table.concat(fills, "\n"), ("local rc = C.lc_call(%d, args)"):format(op.id),
    ("if rc ~= 0 then failed(rc, %d, %q) end"):format(op.id, op.name), write_results(op), "end"}, "\n")
  return text, up
end

-- ---- helpers of the written code ----------------------------------------------------------------------------------
local istype, handle, floor = ffi.istype, bridge.handle, math.floor
local env = {C = C, H = handle, X = bridge.X, Y = bridge.Y, F = bridge.F, I = bridge.I, args = bridge.args,
             depth = bridge.depth,
             istype = istype, type = type, floor = floor, huge = math.huge, own = bridge.own,
             failed = bridge.call_failed}

function env.all_tensors(list)
  for i = 1, #list do
    if not istype(handle, list[i]) then return false end
  end
  return true
end

local list_room, list_cells = 16, ffi.new("lc_handle[16]")
function env.fill_list(list)
  local n = #list
  if n > list_room then
    list_room = n * 2
    list_cells = ffi.new("lc_handle[?]", list_room)
  end
  for i = 1, n do
    local h = list[i]
    list_cells[i - 1]._slot, list_cells[i - 1]._gen = h._slot, h._gen
  end
  bridge.args.list, bridge.args.n_list = list_cells, n
end

-- A list of at most 6 integers and nothing else; dims (not sizes) are never 0.
function env.all_whole(list, are_dims)
  local n = #list
  if n > 6 then return false end
  for i = 1, n do
    local v = list[i]
    if type(v) ~= "number" or floor(v) ~= v or (are_dims and v == 0) then return false end
  end
  return n > 0 or next(list) == nil
end

-- A dim counted from the end, -1 the last, as C counts it.
local function from_end(x, d, name)
  local n = C.lc_ndim(x)
  local room = name == "unsqueeze" and n + 1 or n
  if n >= 0 and room + d < 0 then
    bridge.raise("EARG", name,
                 ("%s: dim %d does not exist: there are %d (dims count from 1, or -1 from the end)")
                   :format(name, d, room))
  end
  return room + d
end
env.from_end = from_end

-- The record's place `at`: length, then the integers; dims of x when x is given.
function env.fill_whole(at, list, x, name)
  local I, n = bridge.I, #list
  I[at] = n
  for i = 1, n do
    local v = list[i]
    if x then v = v > 0 and v - 1 or from_end(x, v, name) end
    I[at + i] = v
  end
end

-- ---- the slow exit: options, numbers for tensors, errors ----------------------------------------------------------
local WANTED = {T = "a tensor", I = "an integer tensor", A = "a tensor", L = "a list of tensors", f = "a number",
                i = "an integer", b = "true or false",
                d = "a dim (an integer from 1, or negative from the end)", s = "a string",
                S = "a shape (integers, at most 6)", D = "dims (integers from 1, or negative from the end)",
                F = "a number or a tensor of one element", N = "an integer or a tensor of one element"}

local function describe(v)
  if v == nil then return "nothing" end
  if bridge.is_tensor(v) then return "a tensor" end
  if type(v) == "number" then return ("%.14g"):format(v) end
  if type(v) == "string" then return ("the string %q"):format(#v > 40 and v:sub(1, 37) .. "..." or v) end
  if type(v) == "boolean" then return tostring(v) end
  return "a " .. type(v)
end

local function is_whole(v) return type(v) == "number" and floor(v) == v end

local fits = {
  T = bridge.is_tensor, I = bridge.is_tensor, A = bridge.is_tensor,
  L = function(v) return type(v) == "table" and v[1] ~= nil and env.all_tensors(v) end,
  f = function(v) return type(v) == "number" end,
  i = is_whole, b = function(v) return type(v) == "boolean" end,
  d = function(v) return is_whole(v) and v ~= 0 end,
  s = function(v) return type(v) == "string" end,
  S = function(v) return is_whole(v) or (type(v) == "table" and env.all_whole(v, false)) end,
  D = function(v) return (is_whole(v) and v ~= 0) or (type(v) == "table" and env.all_whole(v, true)) end,
  F = function(v) return type(v) == "number" or bridge.is_tensor(v) end,
  N = function(v) return is_whole(v) or bridge.is_tensor(v) end,
}

local function refuse(op, format, ...)
  bridge.raise("EARG", op.name, op.name .. ": " .. format:format(...) .. "\n  usage: " .. op.usage .. "   " .. op.doc)
end

local function require_kind(op, p, v)
  if v == nil and (p.default ~= nil or p.optional or p.kind == "D") then return end
  if p.kind == "e" then
    if p.choices[v] then return end
    refuse(op, "%s must be one of %s; got %s", p.name, table.concat(p.names, ", "), describe(v))
  elseif not fits[p.kind](v) then
    if p.kind == "L" and type(v) == "table" then
      for i = 1, #v do
        if not bridge.is_tensor(v[i]) then refuse(op, "%s[%d] must be a tensor; got %s", p.name, i, describe(v[i])) end
      end
    end
    local hint = p.kind == "d" and v == 0 and " (dims count from 1)" or ""
    refuse(op, "%s must be %s; got %s%s", p.name, WANTED[p.kind], describe(v), hint)
  end
end

local function take_options(op, given, options)
  local list
  for key, value in pairs(options) do
    if type(key) == "number" then
      list = list or {}
      list[key] = value
    else
      local k = op.place[key]
      if not k then
        local names = {}
        for i, p in ipairs(op.params) do names[i] = p.name end
        local near = bridge.nearest(tostring(key), op.place)
        refuse(op, "no option '%s'%s; it takes %s", tostring(key),
               near and (" (did you mean '%s'?)"):format(near) or "",
               table.concat(names, ", "))
      end
      if given[k] ~= nil then refuse(op, "%s is given twice", key) end
      given[k] = value
    end
  end
  if not list then return end
  for k, p in ipairs(op.params) do -- x:sum{1, 2, keep = true}
    if (p.kind == "S" or p.kind == "D" or p.kind == "L") and given[k] == nil then
      given[k] = list
      return
    end
  end
  refuse(op, "unexpected value without a name in the options")
end

local function is_options(op, k, v)
  if type(v) ~= "table" then return false end
  local p = op.params[k]
  if op.spread and k > #op.params then return next(v) ~= nil end
  if not p then return true end
  if p.kind == "L" or p.kind == "S" or p.kind == "D" then
    for key in pairs(v) do
      if type(key) == "string" then return true end
    end
    return false
  end
  return true
end

-- A number where a tensor of a pointwise op stands becomes a 0-dim tensor of the others' dtype and device.
local function lift_numbers(op, given)
  if not (op.has.binary or op.has.compare or op.name == "where") then return false end
  local like, lifted
  for k = op.name == "where" and 2 or 1, #op.params do
    if bridge.is_tensor(given[k]) then like = like or given[k] end
  end
  for k, p in ipairs(op.params) do
    if p.x and type(given[k]) == "number" and (like or op.name == "where") then
      given[k] = M.scalar_like(given[k], like)
      lifted = true
    end
  end
  return lifted
end

-- op name -> function(tensor, number): what a number as second operand means; tensor.lua fills it
local short_forms = {}
M.short_forms = short_forms

local function cold_exit(op, ...)
  local given, n = {...}, select("#", ...)
  while n > 0 and given[n] == nil do n = n - 1 end
  local again = false
  if n > 0 and is_options(op, n, given[n]) then
    local options = given[n]
    given[n] = nil
    n = n - 1
    if op.spread and n > #op.params then -- reshape(x, 2, 3, {...}) has no options; only a list may be left
      refuse(op, "unexpected table at the end")
    end
    take_options(op, given, options)
    again = true
  end
  if op.spread and type(given[#op.params]) == "number" then
    local list = {}
    for k = #op.params, #op.params + 6 do
      if given[k] == nil then break end
      list[#list + 1], given[k] = given[k], nil
    end
    if #list > 6 then refuse(op, "a tensor has at most 6 dims; got more") end
    given[#op.params] = list
  end
  local short = short_forms[op.name]
  if short and bridge.is_tensor(given[1]) and type(given[2]) == "number" and given[3] == nil then
    return short(given[1], given[2])
  end
  if lift_numbers(op, given) then again = true end
  for k, p in ipairs(op.params) do require_kind(op, p, given[k]) end
  for k = #op.params + 1, n do
    if given[k] ~= nil then refuse(op, "too many arguments: %d given, %d taken", n, #op.params) end
  end
  if not again then refuse(op, "arguments do not fit") end
  return M.functions[op.name](unpack(given, 1, #op.params))
end

-- ---- all rows -----------------------------------------------------------------------------------------------------
local function bind(op)
  local text, up = write_function(op)
  up.cold = function(...) return cold_exit(op, ...) end
  op.text = text
  return assert(loadstring(text, "=lolcats op " .. op.name))(env, up)
end

for id = 0, C.lc_op_count() - 1 do
  local op = read_row(id)
  M.by_name[op.name] = op
  if not op.has.internal and not op.has.grad then
    M.list[#M.list + 1] = op
    M.functions[op.name] = bind(op)
    bridge.methods[op.name] = M.functions[op.name]
  end
end

return M
