-- ops.lua: tests made from the op table. For every row and every sample of it (tests/ops/samples.lua): float32, bf16 and f16
-- against float64, gradients against finite differences in float64, float32 gradients against those, strided inputs against contiguous
-- ones, and with --device the device against the CPU.
--   lolcats tests/ops.lua [--device mock:0] [--op softmax]
local lc = require "lolcats"
local ops = require "lolcats.core.ops"
local t = dofile "tests/lua/harness.lua"
local args = lc.args {"Tests every row of the op table.", {"device", "cpu", "the device compared with the CPU"}, {"op", "", "one op only"},
                      {"json", "", "a file for the worst error of each op on the device, in float32 and bf16"}}
local S = dofile "tests/ops/samples.lua"
local device = args.device
local same_code = device:match "^mock" ~= nil            -- the CPU's kernels on closed memory; they widen no halves there
local places = device == "cpu" and {"cpu"} or {"cpu", device}
local function halves(where) return not where:match "^mock" end
local exact_bf16

-- ---- running a sample --------------------------------------------------------------------------------------------------
local function is_float(x) return x.dtype == "f64" or x.dtype == "f32" or x.dtype == "bf16" or x.dtype == "f16" end

-- the same argument with every tensor put through f
local function map(v, f)
  if lc.is_tensor(v) then return f(v) end
  if type(v) ~= "table" then return v end
  local out = {}
  for k, x in pairs(v) do out[k] = map(x, f) end
  return out
end

local floats

local function convert(sample, dtype, where, grad)
  local c = map(sample, function(x) return (is_float(x) and x:to(dtype) or x):to(where):clone() end)
  c.frozen, c.visible = sample.frozen, sample.visible
  if grad then for _, x in ipairs(floats(c)) do x:requires_grad_(true) end end
  return c
end

local function count(sample)
  local n = 0
  for k in pairs(sample) do if type(k) == "number" and k > n then n = k end end
  return n
end

local function call(op, sample) return {lc[op.name](unpack(sample, 1, count(sample)))} end

function floats(sample, out)
  out = out or {}
  for k = 1, count(sample) do
    local v = sample[k]
    if lc.is_tensor(v) then
      if is_float(v) and not (sample.frozen and sample.frozen[k]) then out[#out + 1] = v end
    elseif type(v) == "table" then
      local keys = {}
      for name in pairs(v) do keys[#keys + 1] = name end
      table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
      for _, name in ipairs(keys) do if lc.is_tensor(v[name]) and is_float(v[name]) then out[#out + 1] = v[name] end end
    end
  end
  return out
end

-- The largest difference, relative to the largest entry of b, but at least to 0.01: a gradient that is 0 by construction is noise.
local function difference(a, b)
  if a:numel() == 0 then return a:numel() == b:numel() and 0 or math.huge end
  a, b = a:to("cpu"):to("f64"), b:to("cpu"):to("f64")
  local same = a:eq(b):to("f64")
  local d = lc.where(same:to("u8"), lc.zeros_like(a), (a - b):abs()):amax():item()
  local scale = lc.where(b:abs():lt(lc.full_like(b, 1e300)), b:abs(), lc.zeros_like(b)):amax():item()
  if d ~= d then return math.huge end
  return d / math.max(scale, 1e-2)
end

local worst = {} -- op -> dtype -> {error on the device, its limit}
local function note(name, what, got, limit)
  if device == "cpu" or what:sub(1, #device) ~= device then return end
  local op, dtype = name:match "^[%w_]+", what:match "bf16" or what:match "f16" or what:match "f64" or "f32"
  worst[op] = worst[op] or {}
  local w = worst[op][dtype]
  if not w or got > w.error then worst[op][dtype] = {error = got, limit = limit} end
end

local function expect(name, what, got, limit)
  note(name, what, got, limit)
  t.test(("%s: %s"):format(name, what), function()
    if not (got <= limit) then error(("differs by %.3g, allowed %.3g"):format(got, limit), 0) end
  end)
end

-- a sum of all float results with fixed weights: a scalar to differentiate
local function score(results, visible)
  local total
  for k, y in ipairs(results) do
    if is_float(y) and (not visible or k <= visible) then
      local w = ((lc.arange(y:numel(), {dtype = "f64"}) * 0.7 + k):sin() + 0.1):reshape(y.shape):to(y.dtype):to(y.device)
      local s = (y * w):sum()
      total = total and total + s or s
    end
  end
  return total
end

local function gradients(op, sample)
  local out = call(op, sample)
  local s = score(out, sample.visible)
  s:backward()
  local g = {}
  for k, x in ipairs(floats(sample)) do g[k] = x.grad or lc.zeros_like(x) end
  return g
end

local function numeric(op, sample, k) -- central differences on up to 24 elements of float input k
  local x = floats(sample)[k]
  local flat = x:reshape(-1)
  local n = x:numel()
  local step = math.max(1, math.floor(n / 24))
  local eps, worst_scale = 1e-5, 0
  local got = {}
  for i = 1, n, step do
    local v = flat[i]:item()
    flat[i]:fill_(v + eps)
    local up = score(call(op, sample), sample.visible):item()
    flat[i]:fill_(v - eps)
    local down = score(call(op, sample), sample.visible):item()
    flat[i]:fill_(v)
    got[#got + 1] = {i, (up - down) / (2 * eps)}
  end
  return got, worst_scale
end

local function differentiable(op)
  return not (op.has.nondiff or op.has.nograd or op.has.compare)
end

-- ---- checks ------------------------------------------------------------------------------------------------------------
local function check_gradient(op, name, sample)
  local with = convert(sample, "f64", "cpu", true)
  local g = gradients(op, with)
  lc.no_grad(function()
    for k, x in ipairs(floats(with)) do
      if x:numel() > 0 then
        local worst, scale, flat = 0, 1e-3, g[k]:reshape(-1)
        for _, e in ipairs(numeric(op, with, k)) do
          worst = math.max(worst, math.abs(flat[e[1]]:item() - e[2]))
          scale = math.max(scale, math.abs(e[2]))
        end
        expect(name, "gradient " .. k, worst / scale, 1e-6)
      end
    end
  end)
  for _, where in ipairs(places) do
    local g32 = gradients(op, convert(sample, "f32", where, true))
    for k = 1, #g do expect(name, where .. " f32 gradient " .. k, difference(g32[k], g[k]), 1e-4) end
    local narrow = halves(where) and convert(sample, "bf16", where, true)
    if narrow and pcall(function() exact_bf16 = gradients(op, convert(narrow, "f64", "cpu", true)) end) then
      local got = gradients(op, narrow)
      for k = 1, #got do expect(name, where .. " bf16 gradient " .. k, difference(got[k], exact_bf16[k]), 0.06) end
    end
  end
end

local function strided(x) -- the same values behind odd strides
  if not is_float(x) or x:dim() == 0 or x:numel() == 0 then return x end
  local shape = x.shape
  shape[#shape + 1] = 2
  local wide = lc.zeros(shape, {dtype = x.dtype, device = x.device})
  wide:select(-1, 1):copy_(x)
  return wide:select(-1, 1)
end

local function check_sample(op, name, sample)
  local want = lc.no_grad(call, op, convert(sample, "f64", "cpu"))
  local visible = sample.visible or #want
  local f32 = lc.no_grad(call, op, convert(sample, "f32", "cpu"))
  for k = 1, #want do expect(name, "f32 result " .. k, difference(f32[k], want[k]), 1e-5) end
  local s = lc.no_grad(call, op, map(convert(sample, "f32", "cpu"), strided))
  for k = 1, #want do expect(name, "strided result " .. k, difference(s[k], f32[k]), 1e-6) end
  if not op.has.compare and op.name ~= "rope_table" then
    for dtype, limit in pairs {bf16 = 0.04, f16 = 0.006} do
      for _, where in ipairs(places) do
        local narrow = halves(where) and convert(sample, dtype, where)
        local got = narrow and lc.no_grad(call, op, narrow) or {}
        local exact = narrow and lc.no_grad(call, op, convert(narrow, "f64", "cpu"))
        for k = 1, visible do
          if got[k] and is_float(got[k]) then expect(name, where .. " " .. dtype .. " result " .. k, difference(got[k], exact[k]), limit) end
        end
      end
    end
  end
  if device ~= "cpu" then
    local there = lc.no_grad(call, op, convert(sample, "f32", device))
    for k = 1, #want do expect(name, device .. " result " .. k, difference(there[k], want[k]), same_code and 1e-5 or 2e-5) end
    if same_code then
      for k = 1, #want do expect(name, device .. " as the CPU " .. k, difference(there[k], f32[k]), 1e-6) end
    end
    there = lc.no_grad(call, op, map(convert(sample, "f32", device), strided))
    for k = 1, #want do expect(name, device .. " strided result " .. k, difference(there[k], want[k]), 2e-5) end
    there = lc.no_grad(call, op, convert(sample, "f64", device))
    for k = 1, #want do expect(name, device .. " f64 result " .. k, difference(there[k], want[k]), 1e-10) end
  end
  if differentiable(op) then check_gradient(op, name, sample) end
end

local function check_inplace(op, name, sample)
  local function after(dtype, where)
    local c = convert(sample, dtype, where)
    lc.no_grad(call, op, c)
    return floats(c)
  end
  local want, f32 = after("f64", "cpu"), after("f32", "cpu")
  for k = 1, #want do expect(name, "f32 operand " .. k, difference(f32[k], want[k]), 1e-5) end
  if device ~= "cpu" then
    for k, x in ipairs(after("f32", device)) do expect(name, device .. " operand " .. k, difference(x, f32[k]), same_code and 1e-6 or 1e-5) end
    if halves(device) and op.name ~= "adamw_" and op.name ~= "sgd_" then -- what is trained is f32
      local narrow = after("bf16", "cpu")
      for k, x in ipairs(after("bf16", device)) do expect(name, device .. " bf16 operand " .. k, difference(x, narrow[k]), 0.01) end
    end
  end
end

local function check_random(op, more)
  local function draw(dtype, where)
    lc.manual_seed(7)
    local x = lc.zeros({5000}, {dtype = dtype, device = where})
    call(op, {x, unpack(more)})
    return x
  end
  local a, b = draw("f32", "cpu"), draw("f32", device)
  expect(op.name, "the same on " .. device, difference(b, a), device == "cpu" and 0 or 1e-6)
  local mean, want = a:mean():item(), op.name == "uniform_" and 0.5 or more[1]
  expect(op.name, "mean", math.abs(mean - want), 0.1)
end

-- ---- samples of rows without an entry ------------------------------------------------------------------------------------
local function generated(op)
  local make = S.domain[op.name] or S.randn
  local out = {}
  local function add(...)
    local sample = {...}
    for _, v in ipairs(S.extra[op.name] or {}) do sample[#sample + 1] = v end
    out[#out + 1] = sample
  end
  if op.has.binary then
    for _, pair in ipairs(S.binary_shapes) do add(make(pair[1]), make(pair[2])) end
  else
    for _, shape in ipairs(S.unary_shapes) do add(make(shape)) end
  end
  return out
end

lc.manual_seed(1)
local untested = {}
for _, op in ipairs(ops.list) do
  local chosen = args.op == "" or op.name == args.op
  if chosen and not op.has.internal and not op.has.grad then
    local more = S.random[op.name]
    local rows = S.rows[op.name] or S.inplace[op.name] or (op.has.point and function() return generated(op) end)
    if more then
      check_random(op, more)
    elseif op.name == "dropout" then
      t.test("dropout: keeps the mean and its own zeros in the gradient", function()
        lc.manual_seed(3)
        local x = lc.ones(10000):requires_grad_(true)
        local y = x:dropout(0.25)
        y:sum():backward()
        assert(math.abs(y:mean():item() - 1) < 0.03, "mean " .. y:mean():item())
        assert((y - x.grad):abs():amax():item() == 0, "the gradient's zeros are not the result's")
      end)
    elseif not rows then
      untested[#untested + 1] = op.name
    else
      for k, sample in ipairs(rows()) do
        local name = ("%s #%d"):format(op.name, k)
        local ok, message = pcall(lc.scope, op.has.inplace and check_inplace or check_sample, op, name, sample)
        if not ok then t.test(name, function() error(tostring(message), 0) end) end
      end
    end
  end
end
t.test("every row has a sample", function()
  if #untested > 0 then error("without one: " .. table.concat(untested, ", "), 0) end
end)
if args.json ~= "" then lc.files.write_json(args.json, worst) end
t.finish()
