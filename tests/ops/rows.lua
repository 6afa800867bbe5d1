-- rows.lua: reductions, softmax, indexing, norms, rotation and losses at sizes that reach every form of their kernels: long and short
-- rows, columns, chunks, odd lengths, strided operands, lists, the plain twins. A device against float64 on the CPU.
--   lolcats tests/ops/rows.lua [--device cuda:0] [--only norm] [--large]
local lc = require "lolcats"
local t = dofile "tests/lua/harness.lua"
local args = lc.args {
  "Tests ops on rows at sizes that matter to a device.", {"device", "emulated:0", "compared with the CPU"},
  {"only", "", "names that contain this"}, {"large", false, "also what takes a GPU to be quick"},
}
local device = args.device
local limits = {f32 = 2e-5, bf16 = 0.012, f16 = 0.002, f64 = 1e-10}
local gradient_limits = {f32 = 1e-4, bf16 = 0.03, f16 = 0.01, f64 = 1e-9}

local function randn(...) return lc.randn({...}, {dtype = "f64"}) end
local function ids(n, limit) return (lc.randn({n}, {dtype = "f64"}):abs() * 0.4):clamp(0, 0.999):affine(limit, 0):floor():to("i32") end

local function is_float(x) return x.dtype == "f64" or x.dtype == "f32" or x.dtype == "bf16" or x.dtype == "f16" end

local function difference(a, b)
  a, b = a:to("cpu"):to("f64"), b:to("cpu"):to("f64")
  if a:numel() == 0 then return b:numel() == 0 and 0 or math.huge end
  local same = a:eq(b):to("f64") + a:ne(a):to("f64") * b:ne(b):to("f64")
  local d = lc.where(same:gt(lc.zeros_like(same)), lc.zeros_like(a), (a - b):abs())
  local finite = lc.where(b:abs():lt(lc.full_like(b, 1e300)), b:abs(), lc.zeros_like(b))
  d = d:amax():item() / math.max(finite:amax():item(), 1e-2)
  return d == d and d or math.huge
end

-- The float inputs in a dtype on a device, as leaves; strided where the case wants it.
local function inputs(case, dtype, where, from)
  local out = {}
  for i, x in ipairs(from or case.x) do
    local keep = case.keep and case.keep[i]
    out[i] = is_float(x) and x:to(keep and keep ~= true and dtype ~= "f64" and keep or dtype):to(where) or x:to(where)
    if is_float(x) and not keep and not case.no_gradient then out[i]:requires_grad_(true) end
  end
  return out
end

local function run(case, x)
  local seen = {}
  for i, v in ipairs(x) do seen[i] = case.view and case.view[i] and case.view[i](v) or v end
  local y = {case.f(unpack(seen))}
  if case.no_gradient then return y, {} end
  local s = y[1]
  if s:dim() > 0 then
    local w = ((lc.arange(s:numel(), {dtype = "f64"}) * 0.7):sin() + 0.1):reshape(s.shape):to(s.dtype):to(s.device)
    s = (s * w):sum()
  end
  s:backward()
  local g = {}
  for i, v in ipairs(x) do g[i] = v.requires_grad and v.grad or false end
  return y, g
end

local function check(case, dtype)
  lc.scope(function()
    local there = inputs(case, dtype, device)
    local exact = {}
    for i, v in ipairs(there) do exact[i] = lc.no_grad(function() return v:to("cpu"):clone() end) end
    local want, want_g = run(case, inputs(case, "f64", "cpu", exact))
    local got, got_g = run(case, there)
    for i = 1, #got do
      local d, limit = difference(got[i], want[i]), limits[is_float(got[i]) and got[i].dtype or "f64"]
      if case.limit then limit = math.max(limit, case.limit[dtype] or 0) end
      if not (d <= limit) then error(("result %d differs by %.3g, allowed %.3g"):format(i, d, limit), 0) end
    end
    for i = 1, #there do
      if got_g[i] then
        local d, limit = difference(got_g[i], want_g[i]), gradient_limits[dtype]
        if not (d <= limit) then error(("gradient %d differs by %.3g, allowed %.3g"):format(i, d, limit), 0) end
      end
    end
  end)
end

local cases = {}
local function add(name, x, f, more)
  local case = more or {}
  case.name, case.x, case.f = name, x, f
  cases[#cases + 1] = case
end

-- ---- reductions --------------------------------------------------------------------------------------------------------
local swap = {function(x) return x:transpose(1, 2) end}
local first_half = {function(x) return x:slice(-1, 1, math.floor(x:size(-1) / 2)) end}
for _, name in ipairs {"sum", "mean", "amax", "amin"} do
  local op = lc[name]
  add(name .. " of columns", {randn(601, 264)}, function(x) return op(x, {dims = {1}}) end)
  add(name .. " of odd columns", {randn(77, 45)}, function(x) return op(x, {dims = {1}, keep = true}) end)
  add(name .. " of long rows", {randn(3, 9000)}, function(x) return op(x, {dims = {-1}}) end)
  add(name .. " of short rows", {randn(70, 40)}, function(x) return op(x, {dims = {2}}) end)
  add(name .. " of rows of a transposed tensor", {randn(96, 33)}, function(x) return op(x, {dims = {2}}) end, {view = swap})
  add(name .. " of part of each row", {randn(9, 64)}, function(x) return op(x) end, {view = first_half})
  add(name .. " of two dims of three", {randn(5, 24, 32)}, function(x) return op(x, {dims = {1, 3}}) end)
  add(name .. " of a middle dim", {randn(6, 20, 16)}, function(x) return op(x, {dims = {2}}) end)
  add(name .. " of all", {randn(41, 1003)}, function(x) return op(x) end)
end
add("sum of integers", {ids(5000, 1000000)}, function(x) return lc.sum(x) end, {no_gradient = true})
add("sum of bytes", {ids(500, 200):to("u8"):reshape(20, 25)}, function(x) return lc.sum(x, {dims = {1}}) end, {no_gradient = true})
add("count_nonfinite", {randn(30, 700) / lc.where(randn(30, 700):gt(lc.full({30, 700}, 1, {dtype = "f64"})), lc.zeros({30, 700}, {dtype = "f64"}),
                                                   lc.ones({30, 700}, {dtype = "f64"}))}, function(x) return lc.count_nonfinite(x) end, {no_gradient = true})
local many = {}
for i = 1, 70 do many[i] = randn(i % 7 + 1, 13 * (i % 5) + 8) end
many[71] = randn(3, 17000)
add("sum_squares of a list", many, function(...) return lc.sum_squares {...} end, {no_gradient = true})
add("sum_squares of strided tensors", {randn(40, 50), randn(8, 6), randn(9)},
    function(a, b, c) return lc.sum_squares {a:slice(2, 1, 30), b:transpose(1, 2), c, c:slice(1, 2, 9, 3)} end, {no_gradient = true})

-- ---- along one dim -----------------------------------------------------------------------------------------------------
for _, name in ipairs {"softmax", "log_softmax", "logsumexp", "cumsum"} do
  local op = lc[name]
  local narrow = name == "cumsum" and {limit = {bf16 = 0.03, f16 = 0.01}} or nil
  local function more() return narrow and {limit = narrow.limit} or nil end
  add(name .. " of long rows", {randn(3, 5000)}, function(x) return op(x, -1) end, more())
  add(name .. " of odd rows", {randn(5, 1333)}, function(x) return op(x, -1) end, more())
  add(name .. " of short rows", {randn(37, 72)}, function(x) return op(x, -1) end, more())
  add(name .. " of a middle dim", {randn(3, 70, 50)}, function(x) return op(x, 2) end, more())
end
for _, x in ipairs {randn(3, 5000), randn(5, 1333), randn(37, 60)} do
  add("cumsum from the end", {x}, function(x) return lc.cumsum(x, -1, true) end, {limit = {bf16 = 0.03, f16 = 0.01}})
end
add("cumsum of a middle dim from the end", {randn(3, 70, 50)}, function(x) return lc.cumsum(x, 2, true) end, {limit = {bf16 = 0.03, f16 = 0.01}})
local hole = randn(4, 1200)
hole[2]:fill_(-math.huge)
hole:slice(2, 7, 900):select(1, 3):fill_(-math.huge)
hole[4][77]:fill_(math.huge)
add("softmax of infinities", {hole}, function(x) return lc.softmax(x, -1) end, {no_gradient = true})
add("logsumexp of infinities", {hole}, function(x) return lc.logsumexp(x, -1) end, {no_gradient = true})
local ties = (randn(6, 3000) * 2):floor()
ties[3][1500]:fill_(0 / 0)
ties[3][1700]:fill_(0 / 0)
for _, name in ipairs {"argmax", "argmin"} do
  add(name .. " with ties and NaN", {ties}, function(x) return lc[name](x, -1) end, {no_gradient = true})
  add(name .. " of columns", {ties}, function(x) return lc[name](x, 1) end, {no_gradient = true})
  add(name .. " of odd rows", {ties:slice(2, 1, 777):clone()}, function(x) return lc[name](x, 2) end, {no_gradient = true})
end

-- ---- indexing ----------------------------------------------------------------------------------------------------------
add("embedding", {randn(50, 64), ids(600, 50):reshape(20, 30)}, function(w, i) return lc.embedding(w, i) end)
add("embedding of odd rows", {randn(11, 33), ids(90, 11)}, function(w, i) return lc.embedding(w, i) end)
add("index_select of a middle dim", {randn(3, 17, 24), ids(40, 17)}, function(x, i) return lc.index_select(x, 2, i) end)
add("index_select of columns", {randn(9, 31), ids(70, 31)}, function(x, i) return lc.index_select(x, 2, i) end)
add("gather of rows", {randn(5, 700), ids(5 * 300, 700):reshape(5, 300)}, function(x, i) return lc.gather(x, 2, i) end)
add("scatter_add of long rows", {randn(3, 60), ids(3 * 1000, 60):reshape(3, 1000), randn(3, 1000)},
    function(x, i, s) return lc.scatter_add(x, 2, i, s) end)
add("scatter_add of many columns", {randn(9, 4200), ids(40 * 4200, 9):reshape(40, 4200), randn(40, 4200)},
    function(x, i, s) return lc.scatter_add(x, 1, i, s) end)

-- ---- norms, rotation ---------------------------------------------------------------------------------------------------
for _, n in ipairs {24, 100, 333, 1024, 4096, 9000} do
  add("rms_norm of " .. n, {randn(n < 1000 and 50 or 7, n), randn(n)}, function(x, w) return lc.rms_norm(x, w, 1e-5) end)
end
add("rms_norm of parts of rows", {randn(4, 6, 128), randn(64)}, function(x, w) return lc.rms_norm(x, w, 1e-6) end,
    {view = {function(x) return x:slice(-1, 1, 64):transpose(1, 2) end}})
for _, n in ipairs {64, 33, 9000} do
  add("rms_norm beside a residual of " .. n, {randn(9, n), randn(n)}, function(x, w)
    local y = x * 1.5 -- the sum reaches y first, so that the norm's gradient takes it along
    return y + lc.rms_norm(y, w, 1e-5)
  end)
end
add("rms_norm, w alone", {randn(1100, 64), randn(64)}, function(x, w) return lc.rms_norm(x:detach(), w, 1e-5) end)
for _, d in ipairs {128, 64, 6} do
  local pos = lc.arange(9, {dtype = "f64"}) * 11
  local cos, sin = lc.rope_table(pos:to("i32"), randn(d / 2):abs())
  local by_row, by_row_sin = lc.rope_table((randn(2, 9):abs() * 50):floor():to("i64"), randn(d / 2):abs())
  local function turned(x) return x:transpose(2, 3) end
  add("rope of " .. d, {randn(2, 9, 4, d), cos, sin}, function(x, c, s) return lc.rope(x, c, s) end, {view = {turned}, keep = {nil, "f32", "f32"}})
  add("rope by row of " .. d, {randn(2, 3, 9, d), by_row, by_row_sin}, function(x, c, s) return lc.rope(x, c, s, true) end,
      {keep = {nil, true, true}, limit = {bf16 = 0.02}})
end

-- ---- losses ------------------------------------------------------------------------------------------------------------
local function heads(x) return x:transpose(2, 3) end
add("mse_loss of heads", {randn(2, 30, 4, 64), randn(2, 30, 4, 64)}, function(a, b) return lc.mse_loss(a, b) end, {view = {heads, heads}})
add("mse_loss_slope of heads", {randn(2, 30, 4, 64), randn(2, 30, 4, 64)}, function(a, b) return lc.mse_loss_slope(a, b, 3) end, {view = {heads, heads}, no_gradient = true})
add("mse_loss of different orders", {randn(2, 30, 4, 64), randn(2, 4, 30, 64)}, function(a, b) return lc.mse_loss(a, b) end, {view = {heads}})
add("mse_loss of odd rows", {randn(70, 31), randn(70, 31)}, function(a, b) return lc.mse_loss(a, b) end)

local function labels(n, v, ignored)
  local l = ids(n, v)
  for _, i in ipairs(ignored) do l[i]:fill_(-100) end
  return l
end
for _, plain in ipairs {false, true} do
  local function twin(f)
    return function(...)
      lc.set_option("plain_loss", plain)
      return f(...)
    end
  end
  local word = plain and "plain " or ""
  for _, v in ipairs {5000, 333} do
    add(word .. "cross_entropy over " .. v, {randn(9, v) * 3, labels(9, v, {2, 9})}, twin(function(x, l) return lc.cross_entropy(x, l) end))
  end
  add(word .. "cross_entropy of nothing", {randn(3, 20), labels(3, 20, {1, 2, 3})}, twin(function(x, l) return lc.cross_entropy(x, l) end))
  local function fused(x, w, l) return lc.linear_cross_entropy(x, w:detach(), l) end
  local n = plain and 9 or 40
  local x, l = randn(n, 64), labels(n, 2200, {1, 7})
  add(word .. "linear_cross_entropy", {x, randn(2200, 64) * 0.2, l}, twin(fused), {keep = {nil, true}})
  add(word .. "linear_cross_entropy, f32 weights", {x, randn(2200, 64) * 0.2, l}, twin(fused), {keep = {nil, "f32"}})
  add(word .. "linear_cross_entropy, bf16 weights", {x, randn(2200, 64) * 0.2, l}, twin(fused), {keep = {nil, "bf16"}})
  add(word .. "linear_cross_entropy over an odd vocabulary", {randn(n, 24), randn(333, 24), labels(n, 333, {n})}, twin(fused), {keep = {nil, true}})
end
if args.large then
  add("linear_cross_entropy in chunks", {randn(1100, 128), randn(128256, 128) * 0.2, labels(1100, 128256, {5})},
      function(x, w, l) lc.set_option("plain_loss", false) return lc.linear_cross_entropy(x, w:detach(), l) end, {keep = {nil, true}})
  add("sum of many", {randn(3000, 4096)}, function(x) return lc.sum(x) end)
  add("embedding of many", {randn(3000, 4096), ids(5000, 3000)}, function(w, i) return lc.embedding(w, i) end)
  add("rms_norm of many rows", {randn(2000, 4096), randn(4096)}, function(x, w) return lc.rms_norm(x, w, 1e-5) end)
  add("scatter_add of one long row", {randn(5000), ids(200000, 5000), randn(200000)}, function(x, i, s) return lc.scatter_add(x, 1, i, s) end)
end

lc.manual_seed(5)
for _, case in ipairs(cases) do
  if case.name:find(args.only, 1, true) then
    for _, dtype in ipairs {"f32", "bf16", "f16", "f64"} do
      -- mixtures with f64 are refused, and exact ties are another choice after rounding
      local t0 = lc.now()
      t.test(("%s, %s"):format(case.name, dtype), function() check(case, dtype) end)
      if os.getenv "LOLCATS_TEST_TIMES" then print(("%7.2f s  %s %s"):format(lc.now() - t0, case.name, dtype)) end
    end
  end
end
lc.set_option("plain_loss", false)

-- ---- quantised weights, from the reference data where it is there --------------------------------------------------------
local path = (os.getenv "LOLCATS_TEST_DATA" or "../shared") .. "/golden/quant/all_types.gguf"
local there, file = pcall(require("lolcats.files").open_tensors, path)
for _, name in ipairs(there and file:names() or {}) do
  local dtype = file:info(name).dtype
  if name:find "^quant" and dtype and ("quantised"):find(args.only, 1, true) then
    t.test("quantised weights, " .. dtype, function()
      local w = file:tensor(name)
      local far, i = w:to(device), ids(9, w:size(1))
      local d = difference(lc.embedding(far, i:to(device)), lc.embedding(w, i))
      if d > 0 then error(("embedding differs by %.3g"):format(d), 0) end
      for _, plain in ipairs {false, true} do
        lc.set_option("plain_loss", plain)
        for kind, limit in pairs {f32 = 2e-5, bf16 = 0.03} do
          local x = (randn(9, w:size(2)) / w:size(2)):to(kind)
          local here, other = x:clone():requires_grad_(true), x:to(device):requires_grad_(true)
          local near, loss = lc.linear_cross_entropy(here, w, i), lc.linear_cross_entropy(other, far, i:to(device))
          near:backward()
          loss:backward()
          d = math.max(difference(loss, near), difference(other.grad, here.grad))
          if not (d <= limit) then error(("linear_cross_entropy of %s differs by %.3g"):format(kind, d), 0) end
        end
      end
    end)
  end
end
if not there then t.skip("quantised weights", path .. " is not there") end
lc.set_option("plain_loss", false)

if ("bad ids"):find(args.only, 1, true) then
  t.test("bad ids are named", function()
    local w = lc.randn({5, 8}, {device = device})
    local ok, problem = pcall(function()
      local y = lc.embedding(w, lc.tensor({1, 7, 2}, {dtype = "i32"}):to(device))
      return y:to("cpu")
    end)
    if ok or not tostring(problem):find("7", 1, true) then error("not refused: " .. tostring(problem), 0) end
    local fine = lc.embedding(w, lc.tensor({1, 4}, {dtype = "i32"}):to(device)):to("cpu")
    if fine:size(1) ~= 2 then error("unusable afterwards", 0) end
    ok, problem = pcall(function() return lc.cross_entropy(w, lc.tensor({0, 1, 2, 3, 8}, {dtype = "i32"}):to(device)):item() end)
    if ok or not tostring(problem):find("8", 1, true) then error("not refused: " .. tostring(problem), 0) end
  end)
end
t.finish()
