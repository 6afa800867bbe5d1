-- device_elementwise.lua: what the small samples of ops.lua do not reach on a device: vectors and what is left over of them, column
-- slices, broadcast rows, columns and scalars, operands off the 16-byte grid, tiles of transposing copies, every pair of dtypes,
-- quantised blocks, the random stream, optimizer steps that read their scalars on the device. All against the CPU.
--   lolcats tests/device_elementwise.lua --device cuda:0
local lc = require "lolcats"
local t = dofile "tests/lua/harness.lua"
local args = lc.args {"Elementwise kernels of a device against the CPU's.", {"device", "cuda:0", "the device"}}
local device = args.device
local HALVES, FLOATS = {"bf16", "f16"}, {"f32", "bf16", "f16", "f64"}

if device ~= "cpu" and not pcall(function() return lc.zeros({1}, {device = device}) end) then
  t.skip(device, "there is no such device")
  t.finish()
  return
end

local function random(shape, dtype, scale)
  return (lc.randn(shape, {dtype = "f32"}) * (scale or 1)):to(dtype or "f32")
end

-- Equal in every bit but for the NaN's, or near: the limit is relative to 1 + |b|.
local function same(got, want, limit, what)
  t.eq(got.shape, want.shape, what)
  t.eq(got.dtype, want.dtype, what)
  if want:numel() == 0 then return end
  local a, b = got:to("cpu"):to("f64"), want:to("f64")
  local apart = lc.where(a:eq(b), lc.zeros_like(a), (a - b):abs() / (b:abs() + 1))
  apart = lc.where(a:ne(a), b:eq(b):to("f64"), apart) -- NaN here and there is 0, in one place only 1
  local worst = apart:amax():item()
  if not (worst <= (limit or 0)) then error(("%s differs by %.3g, allowed %.3g"):format(what, worst, limit or 0), 0) end
end

local LIMIT = {f32 = 3e-6, bf16 = 2 ^ -8, f16 = 2 ^ -11, f64 = 1e-13}

-- f on the same tensors here and there
local function compare(name, limit, tensors, f)
  t.test(name, function()
    local there = {}
    for k, x in ipairs(tensors) do there[k] = x:to(device) end
    local want, got = f(unpack(tensors)), f(unpack(there))
    if lc.is_tensor(want) then want, got = {want}, {got} end
    for k in ipairs(want) do t.eq(got[k].device, there[1].device) same(got[k], want[k], limit, "result " .. k) end
  end)
end

-- ---- pointwise rows: layouts ---------------------------------------------------------------------------------------------
for _, dtype in ipairs(FLOATS) do
  local limit = LIMIT[dtype]
  for _, n in ipairs {1, 3, 8, 1021, 4096} do
    local a, b = random({n}, dtype), random({n}, dtype)
    compare(("%s [%d]"):format(dtype, n), limit, {a, b}, function(x, y)
      return {x + y, lc.swiglu(x, y), x:gelu(), x:softplus(2, 3), x:clamp(-0.5, 0.25), x:gt(y), -x}
    end)
  end
  local both = random({37, 48}, dtype)
  local function halves_of(x, from) return x[{{}, {from, from + 15}}] end
  compare(dtype .. " column slices", limit, {both}, function(x)
    return {lc.swiglu(halves_of(x, 1), halves_of(x, 17)), lc.swiglu(halves_of(x, 2), halves_of(x, 20)), halves_of(x, 33) * halves_of(x, 17)}
  end)
  local x, row, column = random({5, 7, 32}, dtype), random({32}, dtype), random({5, 7, 1}, dtype)
  compare(dtype .. " broadcast", limit, {x, row, column, random({1}, dtype)}, function(p, q, r, s)
    return {p * q, q - p, p + r, r / (p:abs() + s:abs() + 1), p * s, lc.maximum(p, q), p:transpose(1, 3) + s, p:permute(2, 3, 1) * r:permute(2, 3, 1)}
  end)
  compare(dtype .. " off the grid", limit, {random({133}, dtype), random({133}, dtype)}, function(p, q)
    return {p[{{2, 130}}] + q[{{3, 131}}], p[{{2, 130}}]:exp(), p[{{5, 36}}]:clone()}
  end)
  t.test(dtype .. " gradients of swiglu from column slices", function()
    local grads = {}
    for k, where in ipairs {"cpu", device} do
      local z = both:to(where):clone():requires_grad_(true)
      local y = lc.swiglu(halves_of(z, 1), halves_of(z, 17))
      y:backward(lc.full_like(y, 0.5))
      grads[k] = z.grad
    end
    same(grads[2], grads[1], limit, "gradient")
  end)
end

t.test("the plain twin gives the same", function()
  local a, b = random({64, 96}, "bf16"):to(device), random({96}, "bf16"):to(device)
  local fast = {lc.swiglu(a, b), a:to("f32"), a:transpose(1, 2):clone()}
  lc.set_option("plain_pointwise", true)
  local plain = {lc.swiglu(a, b), a:to("f32"), a:transpose(1, 2):clone()}
  lc.set_option("plain_pointwise", false)
  for k in ipairs(fast) do same(fast[k], plain[k]:to("cpu"), 0, "result " .. k) end
end)

-- ---- special values ------------------------------------------------------------------------------------------------------
local odd = lc.tensor({0 / 0, 1 / 0, -1 / 0, 0, -0.0, 1e-40, 1, -1, 88.8, -88.8, 200, -200, 1e38, -1e38, 0.5, 2.5}, {dtype = "f32"})
for _, dtype in ipairs {"f32", "bf16", "f16", "f64"} do
  compare(dtype .. ": NaN, infinities, far values", LIMIT[dtype], {odd:to(dtype)}, function(x)
    local one = lc.full_like(x, 1)
    return {x:exp(), x:sigmoid(), x:silu(), x:tanh(), x:gelu(), x:relu(), x:softplus(), x:elu(), x:round(), x:floor(), x:sign(), x:log(),
            lc.maximum(x, one), lc.minimum(one, x), x:eq(x), x:ne(x), x:lt(one), x:ge(one)}
  end)
end

-- ---- conversions ---------------------------------------------------------------------------------------------------------
local ALL = {"f32", "bf16", "f16", "f64", "i32", "i64", "u8"}
local numbers = {}
for k = 1, 500 do numbers[k] = (k * 7919 % 1009 - 504) * 2 ^ (k % 23 - 9) / 3 end
for _, v in ipairs {0 / 0, 1 / 0, -1 / 0, 3e9, -3e9, 1e19, -1e19, 255.9, -0.9, 65520, 65519.9, 1e-7, 3e-8, 3.39e38, 1 + 2 ^ -8 + 2 ^ -30, 2049.0000001} do
  numbers[#numbers + 1] = v
end
local wide = lc.tensor(numbers, {dtype = "f64"})
for _, from in ipairs(ALL) do
  local x = wide:to(from)
  for _, to in ipairs(ALL) do
    compare(from .. " to " .. to, 0, {x}, function(y)
      return {y:to(to), y[{{2, 400}}]:to(to), y[{{1, 512}}]:reshape(16, 32)[{{}, {1, 16}}]:to(to), y[{{1, 512}}]:reshape(16, 32):transpose(1, 2):to(to)}
    end)
  end
end

-- ---- copies --------------------------------------------------------------------------------------------------------------
for _, dtype in ipairs(ALL) do
  local x = (lc.arange(3 * 70 * 133, {dtype = "f64"}) * 0.37 + 1):reshape(3, 70, 133):to(dtype)
  compare(dtype .. " copies", 0, {x}, function(y)
    local z = lc.zeros_like(y)
    lc.no_grad(function()
      z:copy_(y[{{}, {}, {5, 5}}])
      z[{2}]:copy_(y[{1}])
      z[{{}, {2, 60}, {3, 9}}]:fill_(7)
    end)
    local out = {y:transpose(2, 3):clone(), y:permute(3, 1, 2):clone(), y:transpose(1, 2):clone(), y[{{}, {}, {2, 130}}]:clone(), z,
            lc.cat({y, y[{{}, {1, 30}}], y[{{}, {}, {}}]}, 2), lc.cat({y[{{}, {}, {1, 64}}], y}, 3), lc.tril(y, 1), lc.tril(y, -3)}
    if LIMIT[dtype] then -- floats alone are chosen
      local mask = y:gt(lc.full_like(y, 9))
      for _, of in ipairs(ALL) do out[#out + 1] = lc.where(mask:to(of), y, z) end
      out[#out + 1], out[#out + 2] = lc.where(mask[{{}, {}, {3, 3}}], y, z), y:masked_fill(mask[{1}], -1 / 0)
    end
    return out
  end)
  t.test(dtype .. " fills", function()
    for _, shape in ipairs {{1}, {5, 7}, {2, 64, 48}} do
      local there, here = lc.zeros(shape, {dtype = dtype, device = device}), lc.zeros(shape, {dtype = dtype})
      for _, f in ipairs {function(z) return z:fill_(3.7) end, function(z) return z:arange_(-3, 0.25) end,
                          function(z) return #shape > 1 and z:eye_() end} do
        f(there)
        f(here)
        same(there, here, 0, "fill")
      end
    end
  end)
end
compare("nothing to do", 0, {lc.zeros({0, 8}), lc.zeros({8})}, function(x, y) return {x + y, x:clone(), x:to("bf16"), x:exp(), lc.cat({x, x}, 1)} end)

for _, to in ipairs(FLOATS) do
  for _, from in ipairs(FLOATS) do
    compare(("%s += %s"):format(to, from), LIMIT[to], {random({24, 40}, to), random({24, 40}, "f32", 9):to(from), random({24, 1}, "f32", 9):to(from)},
            function(x, y, z)
      x = x:clone()
      lc.no_grad(function()
        x:add_(y, 0.5)
        x:add_(z, -2)
        x[{{}, {3, 17}}]:add_(y[{{}, {1, 15}}])
        x:scale_(0.75)
        x[{{}, {1, 8}}]:scale_(-3)
      end)
      return x
    end)
  end
end

-- ---- quantised blocks: a GGUF file of random ones ------------------------------------------------------------------------
local QUANTS = {{2, 32, 18}, {3, 32, 20}, {6, 32, 22}, {7, 32, 24}, {8, 32, 34}, {10, 256, 84}, {11, 256, 110}, {12, 256, 144}, {13, 256, 176},
                {14, 256, 210}, {20, 32, 18}} -- type in the file, elements and bytes a block
t.test("quantised blocks", function()
  local ffi = require "ffi"
  local function int(c, v) return ffi.string(ffi.new(c .. "[1]", v), ffi.sizeof(c)) end
  local function str(s) return int("uint64_t", #s) .. s end
  local head = {"GGUF", int("uint32_t", 3), int("uint64_t", #QUANTS), int("uint64_t", 0)}
  local data, at, state = {}, 0, 12345
  local function pad(s) return s .. ("\0"):rep(-#s % 32) end
  for k, q in ipairs(QUANTS) do
    local bytes = {}
    for i = 1, 3 * 512 / q[2] * q[3] do
      state = (state * 1103515245 + 12345) % 2 ^ 31
      bytes[i] = string.char(math.floor(state / 2 ^ 16) % 256)
    end
    head[#head + 1] = str("t" .. k) .. int("uint32_t", 2) .. int("uint64_t", 512) .. int("uint64_t", 3) .. int("uint32_t", q[1]) .. int("uint64_t", at)
    data[k] = pad(table.concat(bytes))
    at = at + #data[k]
  end
  local path = os.tmpname()
  local file = assert(io.open(path, "wb"))
  file:write(pad(table.concat(head)), table.concat(data))
  file:close()
  local f = require("lolcats.files").open_tensors(path)
  for k in ipairs(QUANTS) do
    local q = f:tensor("t" .. k, {device = "cpu"})
    local there = q:to(device)
    for _, dtype in ipairs(FLOATS) do same(there:to(dtype), q:to(dtype), 0, q.dtype .. " to " .. dtype) end
    same(there[{{2, 3}}]:to("f32"), q[{{2, 3}}]:to("f32"), 0, q.dtype .. " rows")
    local off = lc.zeros({3 * 512 + 1}, {device = device}) -- a result off the 16-byte grid
    lc.no_grad(function() off[{{2, 3 * 512 + 1}}]:reshape(3, 512):copy_(there) end)
    same(off[{{2, 3 * 512 + 1}}]:reshape(3, 512), q:to("f32"), 0, q.dtype .. " off the grid")
    same(there:to("cpu"):to("f32"), q:to("f32"), 0, q.dtype .. " there and back")
  end
  f:close()
  os.remove(path)
end)

-- ---- random numbers ------------------------------------------------------------------------------------------------------
for _, dtype in ipairs(FLOATS) do
  t.test(dtype .. " random stream", function()
    local runs = {}
    for k, where in ipairs {"cpu", device} do
      lc.manual_seed(77)
      local y = {}
      for i, n in ipairs {1, 1027, 6} do
        local x = lc.zeros({n}, {dtype = dtype, device = where})
        y[2 * i - 1], y[2 * i] = x:clone():uniform_(-2, 3), x:clone():normal_(1, 2)
      end
      local x = lc.full({67, 5}, 1.5, {dtype = dtype, device = where}):requires_grad_(true)
      y[7] = lc.dropout(x, 0.3)
      y[7]:backward(lc.full_like(y[7], 2))
      y[8] = x.grad
      runs[k] = y
    end
    for k in ipairs(runs[1]) do same(runs[2][k], runs[1][k], LIMIT[dtype], "draw " .. k) end
  end)
end

-- ---- optimizers ----------------------------------------------------------------------------------------------------------
for _, dtype in ipairs {"f32", "f64"} do
  for _, n in ipairs {5, 1000} do
    local function draw() return random({n}, "f32"):to(dtype) end
    local p, g, m, v = draw(), draw(), draw(), draw():abs()
    compare(("%s optimizers [%d]"):format(dtype, n), LIMIT[dtype], {p, g, m, v}, function(...)
      local x, out = {...}, {}
      local function scalar(value, kind) return lc.tensor(value, {dtype = kind}):to(x[1].device) end
      local function step(f)
        local y = {}
        for k = 1, 4 do y[k] = x[k]:clone() end
        lc.no_grad(function() f(unpack(y)) end)
        for k = 1, 4 do out[#out + 1] = y[k] end
      end
      step(function(a, b, c, d) lc.adamw_(a, b, c, d, 0.01, 3, {weight_decay = 0.1}) end)
      step(function(a, b, c, d)
        lc.adamw_(a, b, c, d, scalar(0.01, "f32"), scalar(3, "i32"), {weight_decay = 0.1, decoupled = false, beta1 = 0.3})
      end)
      step(function(a, b, c) lc.sgd_(a, b, c, 0.1, 1, {momentum = 0.9, dampening = 0.5}) end)
      step(function(a, b, c)
        lc.sgd_(a, b, c, scalar(0.1, "f32"), scalar(2, "i64"), {momentum = 0.9, nesterov = true, weight_decay = 0.01})
      end)
      step(function(a, b) lc.sgd_(a, b, nil, 0.1, 1) end)
      return out
    end)
  end
end

t.finish()
