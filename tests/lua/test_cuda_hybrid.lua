-- The kernels of hybrid attention on a device: the tiled and one-token ways and the plain one against the CPU, over the shapes that
-- decide which is taken. LOLCATS_DEVICE names the device (cuda:0; by default the emulated one, and none is a skip); LOLCATS_TEST_ONLY
-- picks the cases whose name contains it; LOLCATS_TEST_ALL=1 takes the larger sizes too.
local lc = require "lolcats"
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local device = os.getenv "LOLCATS_DEVICE" or "emulated:0"
if not lc.has_device(device) then
  print("skipped: there is no device " .. device)
  os.exit(77)
end
local only, large = os.getenv "LOLCATS_TEST_ONLY", os.getenv "LOLCATS_TEST_ALL" or not device:match "^emulated"
lc.manual_seed(5)

local function test(name, f)
  if only and not name:find(only, 1, true) then return end
  local from = lc.now()
  t.test(name, f)
  if os.getenv "LOLCATS_TEST_TIMES" then print(("%7.2f s  %s"):format(lc.now() - from, name)) end
end

-- |a - b| / |b|; NaN never passes
local function distance(a, b)
  a, b = a:to "cpu":to "f64", b:to "cpu":to "f64"
  return (a - b):pow(2):sum():item() ^ 0.5 / math.max(b:pow(2):sum():item() ^ 0.5, 1e-30)
end
local function near(got, want, limit, what)
  local d = distance(got, want)
  if not (d <= limit) then error(("%s differs by %.3g, allowed %.3g"):format(what, d, limit), 0) end
end

local function with_plain(on, f)
  if on then lc.set_option("plain_hybrid", true) end
  local ok, y = pcall(f)
  if on then lc.set_option("plain_hybrid", false) end
  if not ok then error(y, 0) end
  return y
end

local function half(x, dtype) return x:to(dtype):to "f32" end

-- What a case is made of, on the CPU in f32, holding only what the dtype holds.
local function make(c)
  local dtype, b = c.dtype or "bf16", c.b or 1
  local x = {}
  local function rows(h, n) return half(lc.randn {b, c.t, h, n}, dtype):transpose(2, 3) end
  x.q, x.k, x.v = rows(c.h, c.d), rows(c.g, c.d), rows(c.g, c.d)
  if c.map == "none" then
    x.mq, x.mk = half(lc.rand {b, c.h, c.t, c.F}, dtype), half(lc.rand {b, c.mk_heads or c.h, c.t, c.F}, dtype)
  else
    local s = (c.size or 1) / c.d ^ 0.5
    x.mq, x.mk = half(lc.randn {c.h, c.d, c.f} * s, dtype), half(lc.randn {c.h, c.d, c.f} * s, dtype)
    if c.bias then x.bq, x.bk = half(lc.randn {c.h}, dtype), half(lc.randn {c.h}, dtype) end
  end
  if c.window ~= 0 then x.factors = half(lc.randn {1, c.h, 1, 1}, dtype) end
  if c.start then x.start = lc.tensor(c.start, {dtype = "i32"}) end
  return x
end

local function options(c, x)
  return {map = c.map, full = c.full ~= false, skip = c.skip or false, window = c.window or 64, kind = c.kind or "terrace", affine = c.affine or false,
          bq = x.bq, bk = x.bk, factors = x.factors, start = x.start}
end

local function place(c, x, where, dtype)
  local y = {}
  for name, v in pairs(x) do
    local keep = name == "start" or (c.weights_f32 and c.map ~= "none" and (name == "mq" or name == "mk" or name == "factors" or name == "bq" or name == "bk"))
    y[name] = (keep and v or v:to(dtype)):to(where)
  end
  for _, name in ipairs {"q", "k", "v"} do y[name] = y[name]:transpose(2, 3):contiguous():transpose(2, 3) end
  return y
end

local function run(c, x) return lc.hybrid_attention(x.q, x.k, x.v, x.mq, x.mk, options(c, x)) end

-- ---- whole sequences ---------------------------------------------------------------------------------------------------
local names = {"q", "k", "v", "mq", "mk", "factors"}
local function gradients(c, x, plain) -- plain: in the backward alone, which so tells what the forward kept
  for _, n in ipairs(names) do if x[n] then x[n] = x[n]:detach():requires_grad_(true) end end
  local y = run(c, x)
  local w = ((lc.arange(y:numel(), {dtype = "f32"}) * 0.7):sin() + 0.1):reshape(y.shape):to(y.dtype):to(y.device);
  with_plain(plain, function() (y * w):sum():backward() end)
  local g = {}
  for _, n in ipairs(names) do g[n] = x[n] and x[n].grad end
  return g
end

local function whole(name, c)
  test(name, function()
    local dtype, x = c.dtype or "bf16", make(c)
    local want = lc.no_grad(function() return run(c, x) end)
    local y = lc.no_grad(function() return run(c, place(c, x, device, dtype)) end)
    local first = c.start and 0
    near(y, want, c.limit or (dtype == "f32" and 1e-5 or 1e-2), "the result")
    if c.plain then
      local plain = with_plain(true, function() return lc.no_grad(function() return run(c, place(c, x, device, dtype)) end) end)
      near(plain, want, dtype == "f32" and 1e-5 or 4e-3, "the plain result")
    end
    if c.start then -- rows before the first token
      for b, s in ipairs(c.start) do if s > 0 then t.eq(y:to "cpu":to "f32"[b]:slice(2, 1, s):abs():sum():item(), 0, "padding") end end
    end
    if c.gradient then
      local e = gradients(c, place(c, x, "cpu", "f32"), false)
      for _, plain in ipairs {true, false} do
        local g = gradients(c, place(c, x, device, dtype), plain)
        for n, v in pairs(e) do near(g[n], v, 3e-2, (plain and "the plain" or "the") .. " gradient of " .. n) end
      end
    end
  end)
end

local hedgehog = {map = "softmax_dim", h = 2, g = 1}
local function case(base, more)
  local c = {}
  for k, v in pairs(base) do c[k] = v end
  for k, v in pairs(more) do c[k] = v end
  return c
end
for _, d in ipairs {64, 128} do
  for _, f in ipairs {32, 64} do
    whole(("terrace d %d f %d"):format(d, f), case(hedgehog, {d = d, f = f, t = 200, plain = f == d / 2}))
  end
end
for _, n in ipairs(large and {1, 63, 64, 65, 128, 130, 257, 700, 1024} or {1, 64, 65, 130, 257}) do
  for _, kind in ipairs {"terrace", "sliding", "none"} do
    local window = kind == "none" and 0 or 64
    whole(("%s t %d"):format(kind, n), case(hedgehog, {d = 64, f = 32, t = n, kind = kind ~= "none" and kind or nil, window = window, plain = n == 130}))
  end
end
whole("many segments", case(hedgehog, {d = 64, f = 32, t = large and 2100 or 700, h = 1}))
whole("sliding, many segments", case(hedgehog, {d = 64, f = 32, t = 500, h = 1, kind = "sliding"}))
whole("window 0, many segments", case(hedgehog, {d = 64, f = 32, t = 500, h = 1, window = 0}))
whole("left padding", case(hedgehog, {d = 64, f = 32, t = 150, b = 3, start = {0, 70, 150}}))
whole("left padding, sliding", case(hedgehog, {d = 64, f = 32, t = 150, b = 2, start = {3, 140}, kind = "sliding"}))
whole("four heads share a key head", case(hedgehog, {d = 64, f = 32, t = 150, h = 4, g = 1, b = 2}))
whole("affine", case(hedgehog, {d = 64, f = 32, t = 200, affine = true}))
whole("half the map", case(hedgehog, {d = 64, f = 64, t = 200, full = false}))
whole("exp_dim", case(hedgehog, {d = 64, f = 32, t = 200, map = "exp_dim"}))
whole("large inputs of the map", case(hedgehog, {d = 64, f = 32, t = 200, size = 30, limit = 3e-2}))
whole("pos_elu", case(hedgehog, {d = 64, f = 32, t = 200, map = "pos_elu"}))
whole("relu with bias", case(hedgehog, {d = 64, f = 64, t = 200, map = "relu", bias = true, size = 0.3}))
whole("relu with skip", case(hedgehog, {d = 64, f = 64, t = 200, map = "relu", skip = true, bias = true}))
whole("relu f 128", case(hedgehog, {d = 128, f = 128, t = 140, map = "relu", skip = true}))
whole("ready features", case(hedgehog, {d = 64, map = "none", F = 64, t = 200}))
whole("ready features, one per key head", case(hedgehog, {d = 64, map = "none", F = 128, t = 200, mk_heads = 1, affine = true}))
whole("ready features, sliding", case(hedgehog, {d = 64, map = "none", F = 32, t = 200, kind = "sliding"}))
whole("ready features, window 0", case(hedgehog, {d = 64, map = "none", F = 64, t = 200, window = 0}))
whole("weights in f32", case(hedgehog, {d = 64, f = 32, t = 200, weights_f32 = true}))
for _, dtype in ipairs {"f32", "f16"} do
  whole(dtype, case(hedgehog, {d = 64, f = 32, t = 140, dtype = dtype}))
  whole(dtype .. ", odd sizes", case(hedgehog, {d = 20, f = 12, t = 70, dtype = dtype, window = 10, kind = "sliding", start = {5}}))
end
whole("f32, d 128", case(hedgehog, {d = 128, f = 64, t = 200, h = 4, g = 2, dtype = "f32", plain = true}))
whole("f32, window 0", case(hedgehog, {d = 64, f = 32, t = 150, dtype = "f32", window = 0, plain = true}))
whole("f32, sliding, padding", case(hedgehog, {d = 64, f = 64, t = 150, b = 2, start = {3, 140}, dtype = "f32", kind = "sliding", affine = true}))
whole("f32, relu with bias and skip", case(hedgehog, {d = 96, f = 96, t = 140, dtype = "f32", map = "relu", bias = true, skip = true}))
whole("f32, exp_dim, half the map", case(hedgehog, {d = 64, f = 48, t = 140, dtype = "f32", map = "exp_dim", full = false}))
whole("f32, ready features", case(hedgehog, {d = 64, map = "none", F = 96, t = 140, mk_heads = 1, dtype = "f32", affine = true}))
whole("f32, gradient", case(hedgehog, {d = 64, f = 32, t = 140, dtype = "f32", gradient = true}))
whole("f16, sliding, ready features", case(hedgehog, {d = 64, map = "none", F = 32, t = 140, dtype = "f16", kind = "sliding"}))
whole("bf16, an odd map", case(hedgehog, {d = 80, f = 24, t = 140, map = "pos_elu", F = 24, full = false}))
whole("gradient after the tiles", case(hedgehog, {d = 64, f = 32, t = 140, gradient = true}))
whole("gradient after the tiles, sliding", case(hedgehog, {d = 64, f = 32, t = 140, kind = "sliding", gradient = true}))

-- ---- with a carried state ----------------------------------------------------------------------------------------------
-- The sequence in chunks of the given sizes; results, the state, zsum and the cache are those of the CPU.
local function carried(name, c)
  test(name, function()
    local dtype, b, n = c.dtype or "bf16", c.b or 1, c.slots or c.b or 1
    c.t = 0
    for _, size in ipairs(c.chunks) do c.t = c.t + size end
    local x = make(c)
    local window = c.window or 64
    local F = c.map == "none" and c.F or c.full ~= false and (c.map == "softmax_dim" or c.map == "exp_dim") and 2 * c.f or c.f
    local slot = c.slot and lc.tensor(c.slot, {dtype = "i32"})
    local function walk(where, kind)
      local p = place(c, x, where, kind)
      local s = {state = lc.zeros {n, c.h, F, c.d}, zsum = lc.zeros {n, c.h, F}}
      if window > 0 then
        s.cache = c.map == "none" and lc.zeros {n, 2 * window * (2 * c.g * c.d + (c.mk_heads or c.h) * F)} or lc.zeros {n, 2, c.g, 2 * window, c.d}
      end
      for k, v in pairs(s) do s[k] = v:to(where ~= "cpu" and c.halves and c.halves[k] or "f32"):to(where) end
      local out, seen = {}, {}
      for i = 1, n do seen[i] = 0 end
      local at = 1
      for _, size in ipairs(c.chunks) do
        local o = options(c, p)
        o.state, o.zsum, o.cache, o.slot = s.state, s.zsum, s.cache, slot and slot:to(where)
        o.pos, o.start = lc.tensor(seen, {dtype = "i32"}):to(where), nil
        if at == 1 and c.start then o.start = lc.tensor(c.start, {dtype = "i32"}):to(where) end
        local function cut(v) return v:slice(3, at, at + size - 1) end
        local none = c.map == "none"
        out[#out + 1] = lc.hybrid_attention(cut(p.q), cut(p.k), cut(p.v), none and cut(p.mq) or p.mq, none and cut(p.mk) or p.mk, o):to "cpu":to "f32"
        for i = 1, b do
          local to = c.slot and c.slot[i] + 1 or i
          seen[to] = seen[to] + size - (at == 1 and c.start and c.start[i] or 0)
        end
        at = at + size
      end
      return lc.cat(out, 3), s
    end
    local want, ws = lc.no_grad(function() return {walk("cpu", "f32")} end)
    want, ws = want[1], want[2]
    for _, plain in ipairs(c.plain and {false, true} or {false}) do
      local got = with_plain(plain, function() return lc.no_grad(function() return {walk(device, dtype)} end) end)
      local y, s = got[1], got[2]
      local how = plain and " (plain)" or ""
      near(y, want, dtype == "f32" and 1e-5 or 1e-2, "the result" .. how)
      for k, v in pairs(ws) do if v:abs():sum():item() > 0 then near(s[k], v, dtype == "f32" and 1e-5 or 1e-2, k .. how) end end
    end
  end)
end
local function ones(n, first) local c = {first} for _ = 1, n do c[#c + 1] = 1 end return c end
carried("prefill, then tokens", case(hedgehog, {d = 64, f = 32, chunks = ones(3, 190)}))
carried("tokens across a block", case(hedgehog, {d = 64, f = 32, chunks = ones(6, 189), plain = true}))
carried("tokens, d 128", case(hedgehog, {d = 128, f = 64, chunks = ones(2, 191)}))
carried("tokens, four heads a block", case(hedgehog, {d = 64, f = 32, h = 4, g = 1, b = 2, chunks = ones(4, 190)}))
carried("tokens, sliding", case(hedgehog, {d = 64, f = 32, chunks = ones(4, 66), kind = "sliding", plain = true}))
carried("tokens, window 0", case(hedgehog, {d = 64, f = 32, chunks = ones(3, 70), window = 0, plain = true}))
carried("tokens, small window", case(hedgehog, {d = 64, f = 16, chunks = ones(9, 13), window = 4, dtype = "f32"}))
carried("tokens, relu", case(hedgehog, {d = 64, f = 64, map = "relu", bias = true, skip = true, chunks = ones(3, 190)}))
carried("tokens, ready features", case(hedgehog, {d = 64, F = 32, map = "none", chunks = ones(3, 190), affine = true}))
carried("tokens, ready features of key heads", case(hedgehog, {d = 64, F = 64, map = "none", mk_heads = 1, chunks = ones(3, 126)}))
local thin, thinner = {cache = "bf16"}, {cache = "bf16", state = "bf16"}
for name, halves in pairs {["a bf16 cache"] = thin, ["a bf16 state and cache"] = thinner} do
  carried(name, case(hedgehog, {d = 64, f = 32, b = 2, chunks = ones(4, 190), halves = halves, plain = true}))
  carried(name .. ", d 128", case(hedgehog, {d = 128, f = 64, h = 1, chunks = ones(2, 191), halves = halves}))
  carried(name .. ", sliding", case(hedgehog, {d = 64, f = 16, h = 1, chunks = ones(4, 66), kind = "sliding", halves = halves}))
  carried(name .. ", many rows", case(hedgehog, {d = 64, f = 32, h = 4, g = 1, b = 264, chunks = ones(3, 1), window = 1, halves = halves}))
end
carried("many rows, f32 weights", case(hedgehog, {d = 128, f = 64, h = 4, g = 1, b = 264, chunks = {1, 1, 1, 1, 1}, window = 2, weights_f32 = true}))
-- enough rows for every multiprocessor: the emulated device has few
local many = {h = 4, g = 1, b = device:match "^emulated" and 9 or 270, halves = thinner}
local function of_many(more) for k, v in pairs(many) do more[k] = more[k] or v end return more end
carried("tensor cores", case(hedgehog, of_many {d = 128, f = 64, chunks = ones(4, 190)}))
carried("tensor cores, d 64", case(hedgehog, of_many {d = 64, f = 64, chunks = ones(3, 191), bias = true, skip = true, weights_f32 = true}))
carried("tensor cores, f 128, relu, affine", case(hedgehog, of_many {d = 128, f = 128, map = "relu", chunks = ones(2, 150), affine = true}))
carried("tensor cores, exponentials", case(hedgehog, of_many {d = 128, f = 32, map = "exp_dim", chunks = ones(2, 150)}))
carried("tensor cores, pos_elu, sliding", case(hedgehog, of_many {d = 64, f = 64, map = "pos_elu", kind = "sliding", chunks = ones(3, 100)}))
carried("tensor cores, small window, padding", case(hedgehog, of_many {d = 128, f = 64, window = 12, chunks = ones(26, 7), weights_f32 = true}))
carried("a bf16 state, window 0", case(hedgehog, {d = 64, f = 32, chunks = ones(3, 70), window = 0, halves = {state = "bf16"}}))
carried("a bf16 state, ready features", case(hedgehog, {d = 64, F = 32, map = "none", chunks = ones(3, 190), halves = thinner}))
carried("an f16 state", case(hedgehog, {d = 64, f = 32, dtype = "f16", chunks = ones(2, 191), halves = {state = "f16", cache = "f16"}}))
carried("tokens, f16", case(hedgehog, {d = 64, f = 32, dtype = "f16", chunks = ones(2, 191)}))
for _, kind in ipairs {"terrace", "sliding", "none"} do
  local window = kind == "none" and 0 or 64
  local more = {d = 64, f = 32, kind = kind ~= "none" and kind or nil, window = window}
  carried(kind .. ", chunks", case(hedgehog, case(more, {chunks = {100, 28, 64, 5, 70}})))
  carried(kind .. ", whole blocks", case(hedgehog, case(more, {chunks = {64, 128, 64}})))
  carried(kind .. ", long chunks", case(hedgehog, case(more, {h = 1, chunks = {330, 400}})))
end
carried("f32, chunks", case(hedgehog, {d = 64, f = 32, dtype = "f32", chunks = {100, 28, 64, 70}, plain = true}))
carried("f32, sliding chunks", case(hedgehog, {d = 64, f = 32, dtype = "f32", kind = "sliding", chunks = {100, 28, 64, 70}}))
carried("f32, window 0, chunks", case(hedgehog, {d = 64, f = 32, dtype = "f32", window = 0, chunks = {100, 28, 64, 70}}))
carried("f32, ready features, chunks", case(hedgehog, {d = 64, F = 64, map = "none", dtype = "f32", kind = "sliding", chunks = {100, 28, 64, 70}}))
carried("f16, halves, chunks", case(hedgehog, {d = 64, f = 32, dtype = "f16", chunks = {100, 28, 66}, halves = {state = "f16", cache = "f16"}}))
carried("ready features, chunks", case(hedgehog, {d = 64, F = 64, map = "none", chunks = {100, 28, 64, 70}}))
carried("ready features, sliding chunks", case(hedgehog, {d = 64, F = 64, map = "none", kind = "sliding", chunks = {100, 28, 64, 70}}))
carried("slots and padding", case(hedgehog, {d = 64, f = 32, b = 2, slots = 4, slot = {2, 0}, start = {0, 30}, chunks = {100, 1, 1, 70}}))
t.test("a slot that does not exist", function()
  local c = case(hedgehog, {d = 64, f = 32, t = 1})
  local x = place(c, make(c), device, "bf16")
  local o = options(c, x)
  o.state, o.zsum, o.cache = lc.zeros({1, 2, 64, 64}, {device = device}), lc.zeros({1, 2, 64}, {device = device}), lc.zeros({1, 2, 1, 128, 64}, {device = device})
  o.pos, o.slot = lc.zeros({1}, {dtype = "i32", device = device}), lc.full({1}, 3, {dtype = "i32", device = device})
  local ok = pcall(function() lc.no_grad(function() return lc.hybrid_attention(x.q, x.k, x.v, x.mq, x.mk, o):to "cpu" end) lc.sync(device) end)
  t.ok(not ok, "an error was expected")
end)
t.finish()
