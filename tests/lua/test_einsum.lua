-- test_einsum.lua: einsum against a plain sum over all axes, rearrange against known layouts, gradients through both,
-- and what they say about bad patterns.
local t = dofile(((arg and arg[0] or ""):match("^(.*/)") or "") .. "harness.lua")
local lc = require "lolcats"
lc.manual_seed(2)

-- The definition: a loop over every axis, in Lua numbers.
local function reference(inputs, output, sizes, operands)
  local order, seen = {}, {}
  local function see(list)
    for _, a in ipairs(list) do
      if not seen[a] then seen[a] = true order[#order + 1] = a end
    end
  end
  see(output)
  for _, l in ipairs(inputs) do see(l) end
  local flat = {}
  for i, x in ipairs(operands) do flat[i] = x:flatten():totable() end
  local out, at = {}, {}
  local function offset(list)
    local k = 0
    for _, a in ipairs(list) do k = k * sizes[a] + at[a] end
    return k + 1
  end
  local function loop(level)
    if level > #order then
      local p = 1
      for i, l in ipairs(inputs) do p = p * flat[i][offset(l)] end
      local o = offset(output)
      out[o] = (out[o] or 0) + p
      return
    end
    for i = 0, sizes[order[level]] - 1 do
      at[order[level]] = i
      loop(level + 1)
    end
  end
  loop(1)
  return out
end

local sizes = {a = 2, b = 3, c = 4, d = 5, e = 2, f = 3}
local function letters(s)
  local l = {}
  for c in s:gmatch("%a") do l[#l + 1] = c end
  return l
end

local function check(pattern)
  t.test(pattern, function()
    local left, right = pattern:match("^(.-)%->(.*)$")
    local inputs, operands = {}, {}
    for term in (left .. ","):gmatch("(.-),") do
      local l, shape = letters(term), {}
      for i, a in ipairs(l) do shape[i] = sizes[a] end
      inputs[#inputs + 1], operands[#operands + 1] = l, lc.randn(shape, {dtype = "f64"})
    end
    local output = letters(right)
    local y = lc.einsum(pattern, unpack(operands))
    local shape = {}
    for i, a in ipairs(output) do shape[i] = sizes[a] end
    t.eq(y.shape, shape)
    t.close(y:reshape(-1), reference(inputs, output, sizes, operands), 1e-10)
  end)
end

for _, pattern in ipairs {
  "ab->ba", "ab->a", "ab->b", "ab->", "abc->ca", "a->a", "ab,bc->ac", "ab,bc->ca", "ab,cb->ac", "ba,bc->ac",
  "abc,cd->abd", "abcd,bde->abce", "abcd,abed->abce", "abcd,abed->acbe", "abc,abd->cd", "a,a->", "a,b->ab",
  "a,b->ba", "ab,ab->ab", "ab,a->ab", "ab,b->ab", "ab,b->a", "ab,c->ac", "abc,ac->b", "ab,bc,cd->ad",
  "ab,bc,cd->da", "ab,ab,ab->a", "abcd,bdf->abcf", "abc,dc->adb", "abcd,dc->ab", "abcd,cd,b->a",
  "abcdef,f->abcde", "abcde,e->abcd", "ab,cd->abcd", "abd,acd->abcd", "abc,bad->cd",
} do check(pattern) end

t.test("names, spaces and dots", function()
  local x, w = lc.randn(2, 3, 4), lc.randn(4, 5)
  local want = x:matmul(w)
  t.close(lc.einsum("batch time dim, dim out -> batch time out", x, w), want)
  t.close(lc.einsum("b t d, d f -> b t f", x, w), want)
  t.close(lc.einsum("... d, d f -> ... f", x, w), want)
  t.close(lc.einsum("...d,df->...f", x, w), want)
  t.close(lc.einsum("...d,df->...f", x[1], w), want[1])
  t.close(lc.einsum("... d -> ...", x), x:sum(-1))
  t.close(lc.einsum("b ... d -> d ... b", x), x:transpose(1, 3))
  t.close(lc.einsum("i j , j k -> i k", x[1], w), want[1])
end)

t.test("gradients", function()
  local q = lc.randn(2, 3, 4, {dtype = "f64"}):requires_grad_()
  local w = lc.randn(3, 4, 5, {dtype = "f64"}):requires_grad_()
  local g = lc.randn(2, 3, 5, {dtype = "f64"})
  lc.einsum("b h d, h d f -> b h f", q, w):backward(g)
  t.close(q.grad, lc.einsum("bhf,hdf->bhd", g, w:detach()), 1e-10)
  t.close(w.grad, lc.einsum("bhf,bhd->hdf", g, q:detach()), 1e-10)
end)

t.test("rearrange", function()
  local x = lc.arange(24):reshape(2, 12)
  local y = x:rearrange("t (h d) -> h t d", {h = 3})
  t.eq(y.shape, {3, 2, 4})
  t.eq(y:totable()[2][1], {4, 5, 6, 7})
  t.close(y:rearrange("h t d -> t (h d)"), x)
  t.close(x:rearrange("t (h d) -> h t d", {d = 4}), y)
  t.eq(lc.zeros(2, 3, 4):rearrange("a b c -> (a b) c").shape, {6, 4})
  t.eq(lc.zeros(2, 3, 4):rearrange("a b c -> c (b a)").shape, {4, 6})
  t.eq(lc.zeros(2, 3, 4):rearrange("... c -> c ...").shape, {4, 2, 3})
  t.eq(lc.zeros(2, 1, 4):rearrange("a 1 c -> a c").shape, {2, 4})
  t.eq(lc.zeros(2, 4):rearrange("a c -> a 1 c 1").shape, {2, 1, 4, 1})
  t.eq(lc.rearrange(lc.zeros(6, 8), "(a b) (c d) -> a c b d", {a = 2, d = 2}).shape, {2, 4, 3, 2})
end)

t.test("what is wrong is said", function()
  local x, w = lc.zeros(2, 3), lc.zeros(4, 5)
  t.errors(function() lc.einsum("t d, d f -> t f", x, w) end, "axis 'd' is 3 in operand 1 and 4 in operand 2")
  t.errors(function() lc.einsum("t d, d f -> t g", x, x) end, "axis 'g' of the result is in no operand")
  t.errors(function() lc.einsum("t d -> t", x, w) end, "names 1 operands, 2 are given")
  t.errors(function() lc.einsum("t d f -> t", x) end, "operand 1 has 2 dims")
  t.errors(function() lc.einsum("ii -> i", lc.zeros(2, 2)) end, "axis 'i' stands twice")
  t.errors(function() lc.einsum("t d", x) end, "'%->'")
  t.errors(function() lc.einsum("t d, d f -> t f", x) end, "names 2 operands, 1 are given")
  t.errors(function() lc.einsum("t d, d f -> t f", x, 5) end, "operand 2 must be a tensor")
  t.errors(function() x:rearrange("a (b c) -> a b c") end, "'b' and 'c' are both unknown")
  t.errors(function() x:rearrange("a (b c) -> a b c", {b = 2}) end, "3 elements, which 2 does not divide")
  t.errors(function() x:rearrange("a b -> a c") end, "'c' is only on the right")
  t.errors(function() x:rearrange("a b -> a") end, "'b' is only on the left")
  t.errors(function() x:rearrange("a b c -> a b c") end, "2 dims, the left side names 3")
  t.errors(function() x:rearrange("a b -> b a", {h = 2}) end, "'h' is given a size")
  t.errors(function() x:rearrange("a (b -> a b") end, "parentheses")
end)

t.finish()
