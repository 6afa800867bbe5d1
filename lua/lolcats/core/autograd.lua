-- Backward from Lua: the pump that lets C run its nodes and runs here those that were written in Lua, custom functions,
-- and checkpoints. C never calls Lua: lc_backward_next returns the id of a node that Lua must run, then goes on.
local bridge = require "lolcats.core.ffi"
local scope = require "lolcats.core.scope"
local ops = require "lolcats.core.ops"
local tensor = require "lolcats.core.tensor"
local ffi, C, handle = bridge.ffi, bridge.C, bridge.handle
local check, is_tensor, adopt, methods = bridge.check, bridge.is_tensor, bridge.adopt, bridge.methods
local M = {}

local nodes, n_nodes, next_id = {}, 0, 1 -- id -> {run = function(pump), owned = aliases to drop}

-- ---- tensors that a node holds past their scope -------------------------------------------------------------------
-- An alias at the root, without history and without finaliser: dropped when the node is.
local function hold(owned, h)
  local copy = handle()
  check(C.lc_alias(copy, h), "custom")
  local level = C.lc_scope_of(copy)
  if level > 0 then check(C.lc_promote(copy, level), "custom") end
  owned[#owned + 1] = copy
  return copy
end

-- Replaces the tensors of a table that will be dropped with their scope by held aliases.
local function hold_all(owned, t, seen)
  if seen[t] then return end
  seen[t] = true
  local changed
  for key, v in next, t do
    if is_tensor(v) then
      if C.lc_scope_of(v) ~= 0 then
        changed = changed or {}
        changed[key] = v
      end
    elseif type(v) == "table" then
      hold_all(owned, v, seen)
    end
  end
  for key, v in pairs(changed or {}) do t[key] = hold(owned, v) end
end

local function forget(id)
  local node = nodes[id]
  if not node then return end
  nodes[id], n_nodes = nil, n_nodes - 1
  for _, h in ipairs(node.owned) do C.lc_drop(h) end
end

local dead_id = ffi.new("int32_t[1]")
local function sweep()
  if n_nodes == 0 then return end
  while C.lc_lua_node_dead(dead_id) == 0 and dead_id[0] ~= 0 do forget(dead_id[0]) end
end
scope.at_end[#scope.at_end + 1] = sweep

-- ---- the pump -----------------------------------------------------------------------------------------------------
local function fetch(pump, i)
  local g = handle()
  check(C.lc_backward_grad(pump, i - 1, g), "backward")
  if g._gen == 0 then return nil end
  return adopt(g)
end

local function drive(pump)
  local id = ffi.new("int32_t[1]")
  while true do
    local status = C.lc_backward_next(pump, id)
    if status == C.LC_ENOMEM then
      bridge.reclaim()
      status = C.lc_backward_next(pump, id)
    end
    check(status, "backward")
    if id[0] == 0 then return end
    local node = nodes[id[0]]
    if not node then bridge.raise("EBUG", "backward", "backward: Lua node " .. id[0] .. " is unknown") end
    scope.scope(node.run, pump)
    forget(id[0])
  end
end

local function finish(pump, ok, ...)
  C.lc_backward_free(pump)
  sweep()
  if not ok then error((...), 0) end
end

-- loss:backward([gradient]): adds to the gradient of every leaf that loss depends on, and frees the graph.
local function backward(loss, gradient)
  if gradient ~= nil and not is_tensor(gradient) then
    bridge.fail("backward: the gradient must be a tensor; got %s", type(gradient))
  end
  local out = ffi.new("lc_backward *[1]")
  check(C.lc_backward_begin(out, loss, gradient), "backward")
  local pump = out[0]
  finish(pump, pcall(drive, pump))
end
methods.backward = backward
M.backward = backward

-- ---- nodes in Lua -------------------------------------------------------------------------------------------------
local function pack(...) return {n = select("#", ...), ...} end

local function handles_of(list)
  local cells = ffi.new("lc_handle[?]", math.max(1, #list))
  for i, h in ipairs(list) do cells[i - 1]._slot, cells[i - 1]._gen = h._slot, h._gen end
  return cells
end

local function is_float(h)
  local dtype = C.lc_dtype_of(h)
  return dtype == C.LC_F32 or dtype == C.LC_BF16 or dtype == C.LC_F16 or dtype == C.LC_F64
end

local function tensors_in(values, floats_only)
  local list = {}
  for i = 1, values.n do
    local v = values[i]
    if is_tensor(v) and (not floats_only or is_float(v)) then list[#list + 1] = v end
  end
  return list
end

local function wants_grad(list)
  for _, h in ipairs(list) do
    if C.lc_requires_grad(h) ~= 0 then return true end
  end
  return false
end

-- Results that are an input itself or carry other history get an own handle, so that only the new one has the new
-- history.
local function separate(results, inputs)
  for i = 1, results.n do
    local r = results[i]
    if is_tensor(r) then
      local same = C.lc_requires_grad(r) ~= 0
      for _, x in ipairs(inputs) do same = same or x == r end
      if same then results[i] = methods.alias(r) end
    end
  end
end

local function record(inputs, outputs, node)
  local id = next_id
  next_id = id % 0x7ffffffe + 1
  nodes[id], n_nodes = node, n_nodes + 1
  local status = C.lc_lua_node(id, #inputs, handles_of(inputs), #outputs, handles_of(outputs))
  if status ~= 0 then
    forget(id)
    bridge.raise_status(status, "custom")
  end
end

local function shape_record(h)
  return {shape = h.shape, dtype = h.dtype, device = h.device}
end

-- Gradients of the node's results; zeros where none arrived.
local function result_grads(pump, outlines)
  local grads = {}
  for i, o in ipairs(outlines) do
    grads[i] = fetch(pump, i) or tensor.zeros(o.shape, {dtype = o.dtype, device = o.device})
  end
  return grads
end

local function give(pump, i, name, g)
  if g == nil or C.lc_backward_needs(pump, i - 1) == 0 then return end
  if not is_tensor(g) then bridge.fail("%s: gradient %d must be a tensor or nil; got %s", name, i, type(g)) end
  check(C.lc_backward_give(pump, i - 1, g), name)
end

local Context = {}
Context.__index = Context
function Context:save(...) self.saved = pack(...) end
function Context:unpack() return unpack(self.saved, 1, self.saved.n) end

-- lc.custom{forward = function(ctx, ...) return y end, backward = function(ctx, gy) return gx... end}: a function with
-- its own gradient. forward runs without recording and may leave tensors in ctx; backward returns one gradient (or nil)
-- for each tensor that forward took.
function M.custom(spec)
  if type(spec) ~= "table" or type(spec.forward) ~= "function" or type(spec.backward) ~= "function" then
    bridge.fail("custom: a table with the functions forward and backward is needed")
  end
  for key in pairs(spec) do
    if key ~= "forward" and key ~= "backward" and key ~= "name" then
      bridge.fail("custom: no option '%s'; options are forward, backward, name", tostring(key))
    end
  end
  local name = spec.name or "custom"
  return function(...)
    sweep()
    local given = pack(...)
    local inputs = tensors_in(given)
    local recording = scope.grad_enabled() and wants_grad(inputs)
    local ctx, owned = setmetatable({}, Context), {}
    local results = pack(scope.scope(function(...)
      local r = pack(scope.no_grad(spec.forward, ctx, ...))
      if recording then hold_all(owned, ctx, {}) end
      return unpack(r, 1, r.n)
    end, ...))
    if not recording then return unpack(results, 1, results.n) end
    separate(results, inputs)
    local outputs, outlines = tensors_in(results, true), {}
    if #outputs == 0 then bridge.fail("%s: forward returned no float tensor", name) end
    for i, y in ipairs(outputs) do outlines[i] = shape_record(y) end
    record(inputs, outputs, {owned = owned, run = function(pump)
      local grads = result_grads(pump, outlines)
      local gx = pack(scope.no_grad(spec.backward, ctx, unpack(grads)))
      if gx.n > #inputs then
        bridge.fail("%s: backward returned %d gradients for %d tensors that forward took", name, gx.n, #inputs)
      end
      for i = 1, gx.n do give(pump, i, name, gx[i]) end
    end})
    return unpack(results, 1, results.n)
  end
end

-- ---- checkpoints --------------------------------------------------------------------------------------------------
local seed_out, offset_out = ffi.new("double[1]"), ffi.new("double[1]")
function M.rng_state()
  check(C.lc_rng_get(seed_out, offset_out), "rng_state")
  return {seed = seed_out[0], offset = offset_out[0]}
end
function M.set_rng_state(s)
  if type(s) ~= "table" or type(s.seed) ~= "number" or type(s.offset) ~= "number" then
    bridge.fail("set_rng_state: a table {seed =, offset =} is needed")
  end
  check(C.lc_rng_set(s.seed, s.offset), "set_rng_state")
end
function M.manual_seed(n)
  if type(n) ~= "number" or n < 0 or n > 2 ^ 53 or n % 1 ~= 0 then
    bridge.fail("manual_seed: an integer from 0 to 2^53 is needed; got %s", tostring(n))
  end
  check(C.lc_seed(n), "manual_seed")
end

-- Runs f once more, with recording, on leaves in place of the tensors it took, and gives on what arrives at them.
local function rerun(pump, f, args, inputs, outlines, state)
  local grads = result_grads(pump, outlines)
  local leaves, now = {}, {n = args.n}
  local k = 0
  for i = 1, args.n do
    now[i] = args[i]
    if is_tensor(args[i]) then
      k = k + 1
      local leaf = methods.detach(args[i])
      if inputs[k].needs then check(C.lc_require_grad(leaf, 1), "checkpoint") end
      now[i], leaves[k] = leaf, leaf
    end
  end
  local after = M.rng_state()
  M.set_rng_state(state)
  local results = pack(scope.enable_grad(f, unpack(now, 1, now.n)))
  M.set_rng_state(after)
  local outputs = tensors_in(results, true)
  if #outputs ~= #outlines then
    bridge.fail("checkpoint: the function returned %d tensors, then %d", #outlines, #outputs)
  end
  scope.enable_grad(function()
    if #outputs == 1 then
      if C.lc_requires_grad(outputs[1]) ~= 0 then backward(outputs[1], grads[1]) end
      return
    end
    local total
    for i, y in ipairs(outputs) do
      if C.lc_requires_grad(y) ~= 0 then
        local term = ops.functions.sum(y * grads[i])
        total = total and total + term or term
      end
    end
    if total then backward(total) end
  end)
  for i, leaf in ipairs(leaves) do
    if inputs[i].needs then give(pump, i, "checkpoint", leaf.grad) end
  end
end

-- lc.checkpoint(f, ...): f's results, without keeping what its backward would need: f runs a second time in the
-- backward, with the same random numbers. Parameters that f reads from outside get their gradients too.
function M.checkpoint(f, ...)
  if not scope.grad_enabled() then return f(...) end
  sweep()
  local args = pack(...)
  local inputs, given = {}, tensors_in(args)
  local state = M.rng_state()
  -- recorded, so that what looks at the switch (dropout, windows drawn for training) does the same both times;
  -- forgotten at once, since nothing of the record is returned
  local results = pack(scope.scope(function(...)
    local r = pack(f(...))
    for i = 1, r.n do
      if is_tensor(r[i]) then r[i] = methods.detach(r[i]) end
    end
    return unpack(r, 1, r.n)
  end, ...))
  separate(results, given)
  local outputs, outlines, owned = tensors_in(results, true), {}, {}
  if #outputs == 0 then bridge.fail("checkpoint: the function returned no float tensor") end
  for i, y in ipairs(outputs) do outlines[i] = shape_record(y) end
  for i, x in ipairs(given) do inputs[i] = {needs = C.lc_requires_grad(x) ~= 0} end
  for i = 1, args.n do
    if is_tensor(args[i]) then args[i] = hold(owned, args[i]) end
  end
  record(given, outputs, {owned = owned, run = function(pump) rerun(pump, f, args, inputs, outlines, state) end})
  return unpack(results, 1, results.n)
end

return M
