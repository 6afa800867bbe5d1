-- test_cuda_hybrid_backward.lua: the gradient of hybrid attention on a device: its tensor-core kernels and their plain twin (bf16)
-- against the CPU in float32, by ||got - want|| / ||want||, over geometries, maps, lengths, grouped heads, padding and subsets of
-- wanted gradients. The device is LOLCATS_DEVICE, or emulated:0 if it is there. LOLCATS_HYBRID_CASES: only cases whose name matches.
local lc = require "lolcats"
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local device = os.getenv("LOLCATS_DEVICE") or "emulated:0"
if not lc.has_device(device) then
  io.stdout:write("skipped: there is no device ", device, "\n")
  os.exit(77)
end
local pattern = os.getenv("LOLCATS_HYBRID_CASES")
local names = {"q", "k", "v", "mq", "mk", "bq", "bk", "factors"}

local function randn(shape, by) return (lc.randn(shape) * (by or 1)):to("bf16"):to("f32") end -- values that halves hold exactly

local function inputs(o)
  local b, h, g, d, f = o.b or 1, o.h or 2, o.g or o.h or 2, o.d, o.f
  local x = {q = randn({b, h, o.t, d}, o.scale or 1), k = randn({b, g, o.t, d}, o.scale or 1), v = randn {b, g, o.t, d}}
  if o.map == "none" then
    x.mq, x.mk = randn({b, h, o.t, f}):abs() + 0.0625, randn({b, o.mk_heads or h, o.t, f}):abs() + 0.0625
  else
    x.mq, x.mk = randn({h, d, f}, 1.5 / math.sqrt(d)), randn({h, d, f}, 1.5 / math.sqrt(d))
  end
  if o.bias then x.bq, x.bk = randn {h}, randn {h} end
  if o.window ~= 0 then x.factors = randn {1, h, 1, 1} end
  return x, randn {b, h, o.t, d}
end

local function gradients(x, given, o, where, dtype, plain)
  lc.set_option("plain_hybrid", true) -- the forward is not what is tested
  local a = {}
  for name, v in pairs(x) do
    local kept = name == "factors" or name == "bq" or name == "bk" or (o.wide and (name == "mq" or name == "mk")) -- trained: stay f32
    a[name] = v:to(kept and "f32" or dtype):to(where):clone()
    if not o.want or (" " .. o.want):find(" " .. name .. " ", 1, true) then a[name]:requires_grad_(true) end
  end
  local start = o.start and lc.tensor(o.start, {dtype = "i32"}):to(where)
  local y = lc.hybrid_attention(a.q, a.k, a.v, a.mq, a.mk, {bq = a.bq, bk = a.bk, factors = a.factors, start = start, map = o.map or "softmax_dim",
    skip = o.skip, window = o.window or 64, kind = o.kind or "terrace", affine = o.affine})
  local loss = (y * given:to(y.dtype):to(where)):sum()
  lc.set_option("plain_hybrid", plain)
  loss:backward()
  lc.set_option("plain_hybrid", false)
  local out = {}
  for name, v in pairs(a) do out[name] = v.grad and v.grad:to("cpu"):to("f64") end
  return out
end

local function distance(got, want)
  local size = (want * want):sum():item()
  local d = got - want
  return math.sqrt((d * d):sum():item()) / math.sqrt(math.max(size, 1e-12))
end

local function case(name, o)
  if pattern and not name:find(pattern) then return end
  lc.manual_seed(1 + o.t)
  local x, given = inputs(o)
  local want = gradients(x, given, o, "cpu", "f32", false)
  local plain = gradients(x, given, o, device, "bf16", true)
  local fast = gradients(x, given, o, device, "bf16", false)
  for _, n in ipairs(names) do
    if want[n] then
      t.test(("%s: %s"):format(name, n), function()
        local a, b = distance(plain[n], want[n]), distance(fast[n], want[n])
        if os.getenv "LOLCATS_SHOW" then print(("%-24s %-8s plain %.2e fast %.2e"):format(name, n, a, b)) end
        if #want[n].shape == 1 or n == "factors" then -- sums over all rows, which cancel: each row's share is rounded
          local room = 0.02 * math.sqrt(o.t) + 0.01 * want[n]:abs():amax():item()
          t.ok((plain[n] - want[n]):abs():amax():item() <= room, "plain within " .. room)
          t.ok((fast[n] - want[n]):abs():amax():item() <= room, "fast within " .. room)
          return
        end
        local exact = o.wide and (n == "mq" or n == "mk") -- the plain twin's is not rounded at all
        if not (a <= 1e-2) then error(("plain differs by %.3g"):format(a), 0) end
        if not (b <= 1e-2 and (exact and b <= 5e-3 or b <= 2 * a + 3e-3)) then error(("fast differs by %.3g, plain by %.3g"):format(b, a), 0) end
      end)
    end
  end
end

case("terrace", {t = 257, d = 64, f = 32, h = 1, wide = true})
for _, n in ipairs {1, 64, 65, 130} do case("terrace " .. n, {t = n, d = 64, f = 32, h = 1}) end
case("d128", {t = 200, d = 128, f = 64, h = 1, wide = true})
case("segments", {t = 700, d = 64, f = 16, h = 1, wide = true})
case("sliding", {t = 257, d = 64, f = 32, h = 1, kind = "sliding"})
case("sliding d128", {t = 200, d = 128, f = 64, h = 1, kind = "sliding", affine = true})
case("window 0", {t = 257, d = 64, f = 32, h = 1, window = 0})
case("groups start", {b = 2, t = 150, d = 64, f = 16, h = 4, g = 1, start = {0, 37}, affine = true})
case("exp_dim bias skip", {t = 200, d = 64, f = 64, h = 1, map = "exp_dim", bias = true, skip = true})
case("relu bias", {t = 200, d = 64, f = 64, h = 1, map = "relu", bias = true})
case("pos_elu", {t = 257, d = 64, f = 32, h = 1, map = "pos_elu", kind = "sliding"})
case("ready", {t = 257, d = 64, f = 32, h = 2, g = 1, mk_heads = 1, map = "none", start = {5}})
case("ready sliding", {t = 200, d = 64, f = 64, h = 1, map = "none", kind = "sliding"})
case("transfer", {t = 257, d = 64, f = 32, h = 2, g = 1, wide = true, want = "mq mk factors "})
case("lora", {t = 200, d = 64, f = 32, h = 2, g = 1, want = "q k v "})
case("values", {t = 200, d = 64, f = 32, h = 1, want = "v "})
-- The usual call (head dim 128, 64 inputs of a map, terrace) has walks of its own.
case("usual transfer", {t = 257, d = 128, f = 64, h = 2, g = 1, wide = true, want = "mq mk factors "})
case("usual lora", {t = 257, d = 128, f = 64, h = 2, g = 1, want = "q k v "})
case("usual segments", {t = 700, d = 128, f = 64, h = 1, want = "q k v "})
case("usual segments maps", {t = 700, d = 128, f = 64, h = 1, want = "mq mk factors ", affine = true})
case("usual start", {b = 2, t = 200, d = 128, f = 64, h = 2, start = {0, 77}, want = "q k v factors "})
for _, n in ipairs {1, 64, 65} do case("usual " .. n, {t = n, d = 128, f = 64, h = 1, want = n > 1 and "q k v mq mk factors " or "v mq mk "}) end
case("usual values", {t = 140, d = 128, f = 64, h = 1, want = "v "})
case("usual keys", {t = 140, d = 128, f = 64, h = 1, want = "k "})
case("usual queries", {t = 140, d = 128, f = 64, h = 1, want = "q mk "})
t.finish()
