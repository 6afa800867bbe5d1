-- einsum and rearrange: patterns of named axes, compiled once for a pattern and the ranks it is used with, into
-- reshapes, permutations, sums, products and batched matmuls. Owns the pattern language; no kernels here.
--   lc.einsum("b h t d, h d f -> b h t f", x, w)     lc.einsum("bhtd,hdf->bhtf", x, w)
--   x:rearrange("b t (h d) -> b h t d", {h = 8})
local bridge = require "lolcats.core.ffi"
local ops = require "lolcats.core.ops"
local C, methods = bridge.C, bridge.methods
local op = ops.functions
local M = {}

-- ---- patterns -----------------------------------------------------------------------------------------------------
local function bad(what, pattern, format, ...)
  bridge.raise("EARG", what, ("%s: %s\n  pattern: %s"):format(what, format:format(...), pattern))
end

local function trim(s) return (s:match("^%s*(.-)%s*$")) end

-- "b h t d" or "bhtd" -> {"b", "h", "t", "d"}; "..." stays as one word.
local function axes_of(what, pattern, term, spaced)
  local axes = {}
  if spaced then
    for word in term:gmatch("%S+") do
      if word ~= "..." and not word:match("^[%a_][%w_]*$") then bad(what, pattern, "'%s' is not an axis name", word) end
      axes[#axes + 1] = word
    end
    return axes
  end
  local at = 1
  while at <= #term do
    if term:sub(at, at + 2) == "..." then
      axes[#axes + 1], at = "...", at + 3
    else
      local letter = term:sub(at, at)
      if not letter:match("%a") then bad(what, pattern, "'%s' is not an axis letter", letter) end
      axes[#axes + 1], at = letter, at + 1
    end
  end
  return axes
end

local function split_terms(text)
  local terms = {}
  for term in (text .. ","):gmatch("(.-),") do terms[#terms + 1] = trim(term) end
  return terms
end

local function find(list, v)
  for i = 1, #list do
    if list[i] == v then return i end
  end
end

-- "..." becomes the axes it stands for in this operand, named from the right: "...1" is the last of them.
local function expand_dots(what, pattern, axes, rank, operand)
  local at = find(axes, "...")
  if not at then
    if rank and #axes ~= rank then
      bad(what, pattern, "operand %d has %d dims, its pattern '%s' names %d", operand, rank, table.concat(axes, " "),
          #axes)
    end
    return axes, 0
  end
  local count = rank - (#axes - 1)
  if count < 0 then bad(what, pattern, "operand %d has %d dims, its pattern names %d", operand, rank, #axes - 1) end
  local out = {}
  for i = 1, at - 1 do out[i] = axes[i] end
  for i = count, 1, -1 do out[#out + 1] = "..." .. i end
  for i = at + 1, #axes do out[#out + 1] = axes[i] end
  return out, count
end

local function refuse_repeats(what, pattern, axes, where)
  for i = 1, #axes do
    for j = i + 1, #axes do
      if axes[i] == axes[j] then bad(what, pattern, "axis '%s' stands twice in %s", axes[i], where) end
    end
  end
end

-- ---- steps on one tensor ------------------------------------------------------------------------------------------
local function is_identity(order)
  for i = 1, #order do
    if order[i] ~= i then return false end
  end
  return true
end

-- Permutes x, whose axes are `from`, into `to` (the same axes).
local function order_as(from, to)
  local order = {}
  for i, axis in ipairs(to) do order[i] = find(from, axis) end
  if is_identity(order) then return nil end
  return order
end
local function permuted(x, order) return order and op.permute(x, order) or x end

local function sizes_of(axes, sizes, out)
  for _, axis in ipairs(axes) do out[#out + 1] = sizes[axis] end
  return out
end
local function product(axes, sizes)
  local n = 1
  for _, axis in ipairs(axes) do n = n * sizes[axis] end
  return n
end

-- ---- einsum: compiling --------------------------------------------------------------------------------------------
local function set_of(...)
  local set = {}
  for i = 1, select("#", ...) do
    for _, axis in ipairs((select(i, ...))) do set[axis] = true end
  end
  return set
end

local function join(...)
  local out = {}
  for i = 1, select("#", ...) do
    for _, axis in ipairs((select(i, ...))) do out[#out + 1] = axis end
  end
  return out
end

-- Sums away the axes that nobody asks for any more. Returns a step and the axes left.
local function plan_sum(axes, wanted)
  local dims, left = {}, {}
  for i, axis in ipairs(axes) do
    if wanted[axis] then left[#left + 1] = axis else dims[#dims + 1] = i end
  end
  if #dims == 0 then return nil, axes end
  return dims, left
end

-- The axes of a and b, sorted by their fate: both and kept, both and summed, one side only.
local function classify(a, b, wanted)
  local c = {batch = {}, sum = {}, left = {}, right = {}}
  local in_b, in_a = set_of(b), set_of(a)
  for _, axis in ipairs(a) do
    if not in_b[axis] then
      table.insert(c.left, axis)
    elseif wanted[axis] then
      table.insert(c.batch, axis)
    else
      table.insert(c.sum, axis)
    end
  end
  for _, axis in ipairs(b) do
    if not in_a[axis] then table.insert(c.right, axis) end
  end
  return c
end

-- Elementwise: both sides are laid out along all kept axes, with 1 where an axis is missing.
local function plan_product(a, b, c, target)
  local all = {}
  local have = set_of(a, b)
  for _, axis in ipairs(target) do
    if have[axis] then all[#all + 1] = axis end
  end
  for _, axis in ipairs(join(a, b)) do
    if not find(all, axis) then all[#all + 1] = axis end
  end
  local function side(axes)
    local mine, missing = {}, {}
    for i, axis in ipairs(all) do
      if find(axes, axis) then mine[#mine + 1] = axis else missing[#missing + 1] = i end
    end
    return order_as(axes, mine), missing
  end
  local order_a, missing_a = side(a)
  local order_b, missing_b = side(b)
  return function(x, y)
    x, y = permuted(x, order_a), permuted(y, order_b)
    for _, d in ipairs(missing_a) do x = op.unsqueeze(x, d) end
    for _, d in ipairs(missing_b) do y = op.unsqueeze(y, d) end
    return op.mul(x, y)
  end, all
end

-- Axes folded into one dim: none makes a dim of 1.
local function fold(x, keep, groups, sizes)
  local shape = sizes_of(keep, sizes, {})
  local same = true
  for _, group in ipairs(groups) do
    shape[#shape + 1] = product(group, sizes)
    same = same and #group == 1
  end
  return same and x or op.reshape(x, shape)
end

-- A matmul over the shared axes. With shared batch axes, one-sided axes but the last of each side become batch dims of
-- size 1 on the other side, so that nothing is copied; without, they are folded into rows and columns.
local function plan_matmul(a, b, c, target, swapped)
  local function last_place(axes)
    local place = 0
    for _, axis in ipairs(axes) do place = math.max(place, find(target, axis) or 0) end
    return place
  end
  -- the result lies in the order asked for
  if not swapped and #c.right > 0 and last_place(c.left) > last_place(c.right) then
    local run, axes = plan_matmul(b, a, {batch = c.batch, sum = c.sum, left = c.right, right = c.left}, target, true)
    return function(x, y, sizes) return run(y, x, sizes) end, axes
  end
  local extra_left, extra_right = {}, {}
  local left, right = c.left, c.right
  if #c.batch > 0 and #c.batch + #left + #right <= 6 then
    extra_left, extra_right = {unpack(left, 1, #left - 1)}, {unpack(right, 1, #right - 1)}
    left, right = {left[#left]}, {right[#right]}
  end
  local batch = {}
  for _, axis in ipairs(target) do
    if find(c.batch, axis) or find(extra_left, axis) or find(extra_right, axis) then batch[#batch + 1] = axis end
  end
  for _, axis in ipairs(join(c.batch, extra_left, extra_right)) do
    if not find(batch, axis) then batch[#batch + 1] = axis end
  end
  local function side(axes, mine, rest)
    local own, missing = {}, {}
    for i, axis in ipairs(batch) do
      if find(axes, axis) then own[#own + 1] = axis else missing[#missing + 1] = i end
    end
    return order_as(axes, join(own, rest)), own, missing
  end
  local order_a, own_a, missing_a = side(a, left, join(left, c.sum))
  local order_b, own_b, missing_b = side(b, right, join(c.sum, right))
  if #batch + 2 > 6 then bridge.fail("einsum: a product needs more than 6 dims; fold some axes first") end
  local out = join(batch, left, right)
  return function(x, y, sizes)
    x = fold(permuted(x, order_a), own_a, {left, c.sum}, sizes)
    y = fold(permuted(y, order_b), own_b, {c.sum, right}, sizes)
    for _, d in ipairs(missing_a) do x = op.unsqueeze(x, d) end
    for _, d in ipairs(missing_b) do y = op.unsqueeze(y, d) end
    local z = op.matmul(x, y)
    if #left == 1 and #right == 1 then return z end
    return op.reshape(z, sizes_of(out, sizes, {}))
  end, out
end

local function plan_pair(a, b, wanted, target)
  local only_a, only_b = set_of(b), set_of(a) -- what one side alone has and nobody wants is summed before the product
  for axis in pairs(wanted) do only_a[axis], only_b[axis] = true, true end
  local sum_a, axes_a = plan_sum(a, only_a)
  local sum_b, axes_b = plan_sum(b, only_b)
  local c = classify(axes_a, axes_b, wanted)
  local run, out
  if #c.sum == 0 then
    run, out = plan_product(axes_a, axes_b, c, target)
  else
    run, out = plan_matmul(axes_a, axes_b, c, target)
  end
  return function(x, y, sizes)
    if sum_a then x = op.sum(x, sum_a, false) end
    if sum_b then y = op.sum(y, sum_b, false) end
    return run(x, y, sizes)
  end, out
end

local function parse(pattern)
  local left, right = pattern:match("^(.-)%->(.*)$")
  if not left then bad("einsum", pattern, "'->' and the axes of the result are missing") end
  local terms = split_terms(left)
  right = trim(right)
  local spaced = right:find("%S%s+%S") ~= nil
  for _, term in ipairs(terms) do spaced = spaced or term:find("%S%s+%S") ~= nil end
  local inputs = {}
  for i, term in ipairs(terms) do inputs[i] = axes_of("einsum", pattern, term, spaced) end
  return inputs, axes_of("einsum", pattern, right, spaced)
end

local function compile(pattern, ranks)
  local inputs, output = parse(pattern)
  if #inputs ~= #ranks then
    bad("einsum", pattern, "the pattern names %d operands, %d are given", #inputs, #ranks)
  end
  local dots = 0
  for i, axes in ipairs(inputs) do
    local count
    inputs[i], count = expand_dots("einsum", pattern, axes, ranks[i], i)
    dots = math.max(dots, count)
    refuse_repeats("einsum", pattern, inputs[i], "operand " .. i .. " (a diagonal is not offered)")
  end
  if find(output, "...") then output = expand_dots("einsum", pattern, output, #output - 1 + dots, 0) end
  refuse_repeats("einsum", pattern, output, "the result")
  local known = set_of(unpack(inputs))
  for _, axis in ipairs(output) do
    if not known[axis] then bad("einsum", pattern, "axis '%s' of the result is in no operand", axis) end
  end
  local steps, axes = {}, inputs[1]
  for i = 2, #inputs do
    local wanted = set_of(output)
    for j = i + 1, #inputs do
      for _, axis in ipairs(inputs[j]) do wanted[axis] = true end
    end
    steps[i], axes = plan_pair(axes, inputs[i], wanted, output)
  end
  local final_sum, left = plan_sum(axes, set_of(output))
  return {inputs = inputs, steps = steps, final_sum = final_sum, final_order = order_as(left, output)}
end

local function axis_sizes(plan, pattern, operands)
  local sizes, owner = {}, {}
  for i, axes in ipairs(plan.inputs) do
    for d, axis in ipairs(axes) do
      local n = C.lc_dim(operands[i], d - 1)
      if sizes[axis] and sizes[axis] ~= n then
        bad("einsum", pattern, "axis '%s' is %d in operand %d and %d in operand %d", axis, sizes[axis], owner[axis], n,
            i)
      end
      sizes[axis], owner[axis] = n, owner[axis] or i
    end
  end
  return sizes
end

local plans = {}
local function ranks_key(operands)
  local key = 0
  for i = 1, #operands do key = key * 8 + C.lc_ndim(operands[i]) + 1 end
  return key
end

-- lc.einsum(pattern, a, b, ...)
function M.einsum(pattern, ...)
  if type(pattern) ~= "string" then
    bridge.fail("einsum: the first argument is the pattern, like \"b t d, d f -> b t f\"")
  end
  local operands = {...}
  for i = 1, math.max(1, select("#", ...)) do
    if not bridge.is_tensor(operands[i]) then
      bad("einsum", pattern, "operand %d must be a tensor; got %s", i, type(operands[i]))
    end
  end
  local by_rank = plans[pattern]
  if not by_rank then
    by_rank = {}
    plans[pattern] = by_rank
  end
  local key = ranks_key(operands)
  local plan = by_rank[key]
  if not plan then
    local ranks = {}
    for i, x in ipairs(operands) do ranks[i] = x.ndim end
    plan = compile(pattern, ranks)
    by_rank[key] = plan
  end
  local sizes = axis_sizes(plan, pattern, operands)
  local x = operands[1]
  for i = 2, #operands do x = plan.steps[i](x, operands[i], sizes) end
  if plan.final_sum then x = op.sum(x, plan.final_sum, false) end
  return permuted(x, plan.final_order)
end

-- ---- rearrange ----------------------------------------------------------------------------------------------------
-- "b t (h d)" -> groups {{"b"}, {"t"}, {"h", "d"}}; "1" is the empty group.
local function groups_of(pattern, text)
  local groups, rest = {}, trim(text)
  while rest ~= "" do
    local inner, after = rest:match("^%(([^()]*)%)%s*(.*)$")
    if inner then
      groups[#groups + 1] = axes_of("rearrange", pattern, inner, true)
      if find(groups[#groups], "...") then bad("rearrange", pattern, "'...' cannot stand in a group") end
    else
      local word
      word, after = rest:match("^([^%s()]+)%s*(.*)$")
      if not word then bad("rearrange", pattern, "parentheses do not match") end
      groups[#groups + 1] = word == "1" and {} or axes_of("rearrange", pattern, word, true)
    end
    rest = after
  end
  return groups
end

local function expand_groups(pattern, groups, count)
  local out = {}
  for _, group in ipairs(groups) do
    if group[1] == "..." then
      for i = count, 1, -1 do out[#out + 1] = {"..." .. i} end
    else
      out[#out + 1] = group
    end
  end
  return out
end

local function compile_rearrange(pattern, rank)
  local left, right = pattern:match("^(.-)%->(.*)$")
  if not left then bad("rearrange", pattern, "'->' is missing") end
  local from, to = groups_of(pattern, left), groups_of(pattern, right)
  local dots = false
  for _, group in ipairs(from) do dots = dots or group[1] == "..." end
  local count = dots and rank - (#from - 1) or 0
  if count < 0 or (not dots and #from ~= rank) then
    bad("rearrange", pattern, "the tensor has %d dims, the left side names %d", rank, dots and #from - 1 or #from)
  end
  from, to = expand_groups(pattern, from, count), expand_groups(pattern, to, count)
  local flat_from, flat_to = join(unpack(from)), join(unpack(to))
  refuse_repeats("rearrange", pattern, flat_from, "the left side")
  refuse_repeats("rearrange", pattern, flat_to, "the right side")
  for _, axis in ipairs(flat_to) do
    if not find(flat_from, axis) then bad("rearrange", pattern, "axis '%s' is only on the right side", axis) end
  end
  for _, axis in ipairs(flat_from) do
    if not find(flat_to, axis) then
      bad("rearrange", pattern, "axis '%s' is only on the left side; sum or index it away first", axis)
    end
  end
  if #flat_from > 6 then bad("rearrange", pattern, "more than 6 axes") end
  return {from = from, to = to, flat_from = flat_from, flat_to = flat_to, order = order_as(flat_from, flat_to)}
end

-- The size of every axis, from the tensor and the sizes given; one axis of a group may be left to find out.
local function solve_sizes(plan, pattern, x, given)
  local sizes = {}
  for axis, n in pairs(given) do
    if not find(plan.flat_from, axis) then
      bad("rearrange", pattern, "'%s' is given a size, but is no axis of the pattern", tostring(axis))
    end
    if type(n) ~= "number" or n < 0 or n % 1 ~= 0 then
      bad("rearrange", pattern, "the size of '%s' must be an integer", axis)
    end
    sizes[axis] = n
  end
  for d, group in ipairs(plan.from) do
    local n, unknown, known = C.lc_dim(x, d - 1), nil, 1
    for _, axis in ipairs(group) do
      if sizes[axis] then
        known = known * sizes[axis]
      elseif unknown then
        bad("rearrange", pattern, "the sizes of '%s' and '%s' are both unknown; give one, like {%s = 8}", unknown,
            axis, unknown)
      else
        unknown = axis
      end
    end
    if unknown then
      if known == 0 or n % known ~= 0 then
        bad("rearrange", pattern, "dim %d has %d elements, which %d does not divide (axis '%s')", d, n, known, unknown)
      end
      sizes[unknown] = n / known
    elseif known ~= n then
      local text = #group > 0 and table.concat(group, " ") or "1"
      bad("rearrange", pattern, "dim %d has %d elements; '%s' makes %d", d, n, text, known)
    end
  end
  return sizes
end

local function is_plain(groups)
  for _, group in ipairs(groups) do
    if #group ~= 1 then return false end
  end
  return true
end

-- x:rearrange("b t (h d) -> b h t d", {h = 8})
function M.rearrange(x, pattern, given)
  if not bridge.is_tensor(x) or type(pattern) ~= "string" then
    bridge.fail("rearrange: a tensor and a pattern are needed, like x:rearrange(\"b t (h d) -> b h t d\", {h = 8})")
  end
  local rank = x.ndim
  local by_rank = plans[pattern]
  if not by_rank then
    by_rank = {}
    plans[pattern] = by_rank
  end
  local key = -1 - rank
  local plan = by_rank[key]
  if not plan then
    plan = compile_rearrange(pattern, rank)
    plan.split, plan.merge = not is_plain(plan.from), not is_plain(plan.to)
    by_rank[key] = plan
  end
  local sizes = solve_sizes(plan, pattern, x, given or {})
  if plan.split then x = op.reshape(x, sizes_of(plan.flat_from, sizes, {})) end
  x = permuted(x, plan.order)
  if plan.merge then
    local shape = {}
    for i, group in ipairs(plan.to) do shape[i] = product(group, sizes) end
    x = op.reshape(x, shape)
  end
  return x
end
methods.rearrange = M.rearrange

return M
