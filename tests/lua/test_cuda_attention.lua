-- test_cuda_attention.lua: softmax attention and its gradient on a device: the tiled tensor-core kernels and their plain twin in halves
-- against the CPU in float32, by ||got - want|| / ||want||, over head dims, lengths, caches longer than the queries, windows, padding,
-- grouped heads and subsets of wanted gradients. The device is LOLCATS_DEVICE, or emulated:0 if it is there; LOLCATS_TEST_ONLY picks the
-- cases whose name contains it, LOLCATS_TEST_ALL=1 takes the larger sizes too, LOLCATS_SHOW=1 prints the distances.
local lc = require "lolcats"
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local device = os.getenv "LOLCATS_DEVICE" or "emulated:0"
if not lc.has_device(device) then
  print("skipped: there is no device " .. device)
  os.exit(77)
end
local only, show = os.getenv "LOLCATS_TEST_ONLY", os.getenv "LOLCATS_SHOW"
local large = os.getenv "LOLCATS_TEST_ALL" or not device:match "^emulated"
local names = {"q", "k", "v"}

local function distance(got, want)
  local size, of_ones = want:pow(2):sum():item() ^ 0.5, want:numel() ^ 0.5
  if size < 1e-3 * of_ones then size = of_ones end -- what should be 0: sums whose terms cancel
  return (got - want):pow(2):sum():item() ^ 0.5 / size
end

-- What a case is made of, on the CPU in f32, holding only what the dtype holds.
local function make(c)
  local dtype, b, h, g = c.dtype or "bf16", c.b or 1, c.h or 1, c.g or 1
  local function rows(n, heads, by) return (lc.randn {b, n, heads, c.d} * (by or 1)):to(dtype):to "f32":transpose(2, 3) end
  local x = {q = rows(c.t, h, c.size), k = rows(c.s or c.t, g), v = rows(c.s or c.t, g)}
  return x, rows(c.t, h)
end

-- Results y, and the gradients of those that c.want names (all without); lse is seen through the gradients.
local function run(c, x, given, where, dtype, plain)
  lc.set_option("plain_attention", plain)
  local a = {}
  for _, n in ipairs(names) do
    local v = x[n]:to(dtype):to(where)
    a[n] = c.contiguous and v:contiguous() or v:transpose(2, 3):contiguous():transpose(2, 3)
    if not c.forward and (not c.want or c.want:find(n)) then a[n] = a[n]:detach():requires_grad_(true) end
  end
  local ok, out = pcall(function()
    local o = {start = c.start and lc.tensor(c.start, {dtype = "i32"}):to(where), window = c.window, scale = c.scale}
    if c.length then o.length = lc.tensor(c.length, {dtype = "i32"}):to(where) end
    local y = lc.attention(a.q, a.k, a.v, o)
    if not c.forward then (y * given:to(y.dtype):to(where)):sum():backward() end
    local r = {y = y:detach():to "cpu":to "f64"}
    for n, v in pairs(a) do r["gradient of " .. n] = v.grad and v.grad:to "cpu":to "f64" end
    return r
  end)
  lc.set_option("plain_attention", false)
  if not ok then error(out, 0) end
  return out
end

local function case(name, c)
  if only and not name:find(only, 1, true) then return end
  t.test(name, function()
    lc.manual_seed(1 + c.t + c.d)
    local dtype, x, given = c.dtype or "bf16", make(c)
    local want = run(c, x, given, "cpu", "f32", false)
    local fast, plain = run(c, x, given, device, dtype, false), c.t <= 300 and run(c, x, given, device, dtype, true)
    local least = dtype == "bf16" and 5e-3 or 1e-3
    for n, v in pairs(want) do
      local b, p = distance(fast[n], v), plain and distance(plain[n], v) or least
      if show then print(("%-40s %-14s plain %.2e fast %.2e"):format(name, n, p, b)) end
      if not (p <= 2 * least) then error(("plain: %s differs by %.3g"):format(n, p), 0) end
      if not (b <= p + least) then error(("%s differs by %.3g, the plain one by %.3g"):format(n, b, p), 0) end
    end
    if c.start then
      for b, s in ipairs(c.start) do
        local none = math.min(math.max(s - ((c.length or c.s or c.t) - c.t), 0), c.t) -- queries that see nothing
        if none > 0 then t.eq(fast.y[b]:slice(2, 1, none):abs():sum():item(), 0, "padding") end
      end
    end
  end)
end

for _, d in ipairs {64, 128} do
  for _, n in ipairs(large and {1, 63, 64, 65, 127, 128, 129, 130, 257, 700, 1024} or {1, 9, 63, 64, 65, 130, 257}) do
    case(("d %d t %d"):format(d, n), {d = d, t = n})
  end
  case(("d %d f16"):format(d), {d = d, t = 150, dtype = "f16", h = 2})
  case(("d %d four heads share a key head"):format(d), {d = d, t = 150, h = 4, b = 2})
  case(("d %d many heads"):format(d), {d = d, t = 70, h = 8, g = 2, b = large and 70 or 3})
end
if large then case("d 128 long", {d = 128, t = 4100, h = 4, g = 1, b = 2}) end
case("t 700", {d = 64, t = 700, forward = not large})
case("heads of one block", {d = 64, t = 200, h = 4, g = 2, b = large and 80 or 1})
case("contiguous", {d = 128, t = 140, h = 2, g = 1, b = 2, contiguous = true})
case("large scores", {d = 64, t = 200, size = 8, scale = 0.5})
for _, s in ipairs {70, 200, 391} do
  case(("s %d, t 60"):format(s), {d = 64, t = 60, s = s, h = 2})
  case(("s %d, t 130"):format(s + 130), {d = 128, t = 130, s = s + 130, h = 2, window = 100})
end
case("length", {d = 64, t = 60, s = 300, length = 170, h = 2, forward = true})
case("length, few queries", {d = 64, t = 3, s = 300, length = 270, h = 2, forward = true})
for _, w in ipairs {1, 5, 64, 100, 129} do case(("window %d"):format(w), {d = 64, t = 300, window = w}) end
case("left padding", {d = 64, t = 150, b = 4, start = {0, 1, 70, 140}})
case("left padding over tiles", {d = 128, t = 300, b = 3, start = {128, 255, 300}, h = 2})
case("left padding, window", {d = 64, t = 300, b = 2, start = {3, 200}, window = 90})
case("left padding, s 300", {d = 64, t = 100, s = 300, b = 2, start = {30, 250}, h = 4})
for _, want in ipairs {"q", "k", "v", "qk", "kv"} do case("gradient of " .. want .. " alone", {d = 64, t = 140, h = 2, want = want}) end
case("decoding", {d = 128, t = 1, s = 700, h = 4, forward = true, b = 2, start = {0, 300}})
t.finish()
