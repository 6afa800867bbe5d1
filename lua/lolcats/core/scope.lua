-- Who lives how long: scopes that drop what was made inside, promotion of what is returned, tensors kept for good, and
-- the switch of gradient recording. Scopes unwind on errors too.
local bridge = require "lolcats.core.ffi"
local ffi, C, handle = bridge.ffi, bridge.C, bridge.handle
local depth, drop = bridge.depth, C.lc_drop
local check, istype = bridge.check, ffi.istype
local M = {}

depth[0] = C.lc_scope_depth()

local function claim(h, levels, op)
  check(C.lc_promote(h, levels), op)
  if C.lc_scope_of(h) == 0 then ffi.gc(h, drop) end
end

-- Calls visit(h) for every tensor in v, which may be a tensor or a table of any depth.
local function walk(v, visit, seen)
  if istype(handle, v) then return visit(v) end
  if type(v) ~= "table" then return end
  seen = seen or {}
  if seen[v] then return end
  seen[v] = true
  for _, inner in next, v do
    if type(inner) == "table" or type(inner) == "cdata" then walk(inner, visit, seen) end
  end
end
M.walk = walk

local at_end = {} -- functions to run after a scope closed (autograd.lua drops dead Lua nodes)
M.at_end = at_end

local target = 0 -- the depth that promote_up moves to
local function promote_up(h)
  local at = C.lc_scope_of(h)
  if at > target then
    check(C.lc_promote(h, at - target), "scope")
    if target == 0 then ffi.gc(h, drop) end
  end
end

-- Ends the scope at `level`, and any above it that a loop was left from.
local function pop_to(level)
  while C.lc_scope_depth() >= level do C.lc_scope_pop() end
  depth[0] = level - 1
  for i = 1, #at_end do at_end[i]() end
end

local function close(level, ok, ...)
  if ok then
    target = level - 1
    for i = 1, select("#", ...) do
      local v = select(i, ...)
      if istype(handle, v) then
        promote_up(v)
      elseif type(v) == "table" then
        walk(v, promote_up)
      end
    end
  end
  pop_to(level)
  if not ok then error((...), 0) end
  return ...
end

-- For a loop that cannot be a function (the body of a for): level = enter() ... leave(level) drops what was made since.
-- A level that has been left already is nothing to leave.
function M.enter()
  depth[0] = C.lc_scope_push()
  return depth[0]
end
function M.leave(level)
  if depth[0] >= level then pop_to(level) end
end

-- lc.scope(f, ...): f's results; every other tensor made inside is dropped when f ends, by return or by error.
function M.scope(f, ...)
  local level = C.lc_scope_push()
  depth[0] = level
  return close(level, pcall(f, ...))
end

local function keep_one(h)
  local level = C.lc_scope_of(h)
  if level > 0 then claim(h, level, "keep") end
end

-- lc.keep(x): x, or every tensor in a table, outlives all scopes; it lives as long as Lua names it.
function M.keep(v, ...)
  walk(v, keep_one)
  if select("#", ...) > 0 then return v, M.keep(...) end
  return v
end

-- lc.param(x): a leaf that is trained: outlives all scopes, requires a gradient.
function M.param(x)
  if not istype(handle, x) then bridge.fail("param: a tensor is needed; got %s", type(x)) end
  keep_one(x)
  check(C.lc_require_grad(x, 1), "param")
  return x
end

local function restore(old, ok, ...)
  C.lc_grad_mode(old)
  if not ok then error((...), 0) end
  return ...
end

function M.no_grad(f, ...) return restore(C.lc_grad_mode(0), pcall(f, ...)) end
function M.enable_grad(f, ...) return restore(C.lc_grad_mode(1), pcall(f, ...)) end
function M.grad_enabled() return C.lc_grad_mode(-1) ~= 0 end

-- After an interruption that may have struck between the lines above: ends the scopes above `level`, records gradients
-- again.
function M.recover(level)
  while C.lc_scope_depth() > (level or 0) do C.lc_scope_pop() end
  depth[0] = C.lc_scope_depth()
  C.lc_grad_mode(1)
end

return M
