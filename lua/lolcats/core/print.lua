-- A tensor as text: a header line, the elements in aligned columns with four decimals (one common factor when they are
-- very large or very small), at most six rows and columns from each edge, and a line of statistics when something was
-- left out. Large tensors are cut to what is shown before anything is copied.
local bridge = require "lolcats.core.ffi"
local tensor = require "lolcats.core.tensor"
local ops = require "lolcats.core.ops"
local scope = require "lolcats.core.scope"
local C, methods, fields = bridge.C, bridge.methods, bridge.fields
local op = ops.functions
local M = {edge = 6, outer_edge = 2}

local LC_FIRST_QUANTISED = C.LC_Q4_0

-- "f32[4 x 6] cpu"
local function header(x)
  local shape = table.concat(fields.shape(x), " x ")
  local text = ("%s[%s] %s"):format(fields.dtype(x), shape, fields.device(x))
  local name = fields.name(x)
  if name ~= "" then text = text .. "  " .. name end
  if fields.requires_grad(x) then text = text .. "  (requires grad)" end
  return text
end
M.header = header

-- The positions of a dim that are shown; 0 stands for the ellipsis.
local function shown(size, edge)
  local list = {}
  if size <= 2 * edge + 1 then
    for i = 1, size do list[i] = i end
    return list, false
  end
  for i = 1, edge do list[i] = i end
  list[edge + 1] = 0
  for i = size - edge + 1, size do list[#list + 1] = i end
  return list, true
end

-- x with only the positions that are shown; the longest dims are cut first, so that little is copied.
local function crop(x, lists, cut)
  local order, shape = {}, fields.shape(x)
  for d = 1, #shape do order[d] = d end
  table.sort(order, function(a, b)
    if shape[a] ~= shape[b] then return shape[a] > shape[b] end
    return a < b
  end)
  for _, d in ipairs(order) do
    if cut[d] then
      local edge = (#lists[d] - 1) / 2
      x = op.cat({methods.slice(x, d, 1, edge), methods.slice(x, d, -edge, -1)}, d)
    end
  end
  return x
end

-- ---- numbers ------------------------------------------------------------------------------------------------------
local function special(v)
  if v ~= v then return "nan" end
  if math.abs(v) == math.huge then return v > 0 and "inf" or "-inf" end
end

-- A function number -> text for all of the values, and the common factor (nil or a power of ten).
local function format_for(values, is_integer)
  local largest, smallest, whole = 0, math.huge, true
  for i = 1, #values do
    local a = math.abs(values[i])
    if a == a and a ~= math.huge then
      if a > largest then largest = a end
      if a > 0 and a < smallest then smallest = a end
      if a % 1 ~= 0 then whole = false end
    end
  end
  local factor
  if whole and (is_integer or largest < 1e6) then
    return function(v) return special(v) or ("%.0f"):format(v) end
  end
  if largest >= 1e5 or largest < 1e-2 then
    factor = 10 ^ math.floor(math.log10(largest))
  end
  return function(v)
    return special(v) or ("%.4f"):format(factor and v / factor or v)
  end, factor
end

function M.number(v)
  if special(v) then return special(v) end
  if v % 1 == 0 and math.abs(v) < 1e15 then return ("%.0f"):format(v) end
  return ("%.6g"):format(v)
end

-- ---- layout -------------------------------------------------------------------------------------------------------
local function flatten_values(t, out)
  for i = 1, #t do
    if type(t[i]) == "table" then flatten_values(t[i], out) else out[#out + 1] = t[i] end
  end
  return out
end

local function pad(text, width) return (" "):rep(width - #text) .. text end

local function row_text(cells, columns, width)
  local parts, k = {}, 0
  for i, position in ipairs(columns) do
    if position == 0 then
      parts[i] = "…"
    else
      k = k + 1
      parts[i] = pad(cells[k], width)
    end
  end
  return table.concat(parts, "  ")
end

-- Rows of a matrix given as a nested table of texts.
local function matrix_lines(texts, rows, columns, width, lines)
  local k = 0
  for _, position in ipairs(rows) do
    if position == 0 then
      lines[#lines + 1] = "  …"
    else
      k = k + 1
      lines[#lines + 1] = "  " .. row_text(texts[k], columns, width)
    end
  end
end

-- The matrices of a tensor with more than two dims, each under its position: "[2, 1]".
local function block_lines(texts, lists, d, prefix, width, lines)
  if d == #lists - 1 then
    lines[#lines + 1] = "[" .. table.concat(prefix, ", ") .. "]"
    return matrix_lines(texts, lists[d], lists[d + 1], width, lines)
  end
  local k = 0
  for _, position in ipairs(lists[d]) do
    if position == 0 then
      lines[#lines + 1] = "…"
    else
      k = k + 1
      prefix[d] = position
      block_lines(texts[k], lists, d + 1, prefix, width, lines)
      prefix[d] = nil
    end
  end
end

local function map_texts(t, f)
  local out = {}
  for i = 1, #t do
    if type(t[i]) == "table" then out[i] = map_texts(t[i], f) else out[i] = f(t[i]) end
  end
  return out
end

local function statistics(x)
  local dtype = C.lc_dtype_of(x)
  if dtype == C.LC_I32 or dtype == C.LC_I64 or dtype == C.LC_U8 then return nil end
  local bad = op.count_nonfinite(x):item()
  if bad == 0 then
    return ("min %.4g  max %.4g  mean %.4g  nan 0  inf 0"):format(op.amin(x):item(), op.amax(x):item(),
                                                                  op.mean(x):item())
  end
  local nan = op.sum(op.ne(x, x)):item()
  return ("nan %.0f  inf %.0f"):format(nan, bad - nan)
end

local function body(x, lines)
  local shape = fields.shape(x)
  local lists, cut, any = {}, {}, false
  for d = 1, #shape do
    lists[d], cut[d] = shown(shape[d], d >= #shape - 1 and M.edge or M.outer_edge)
    any = any or cut[d]
  end
  local values = methods.totable(crop(x, lists, cut))
  local flat = flatten_values(values, {})
  local dtype = C.lc_dtype_of(x)
  local format, factor = format_for(flat, dtype >= C.LC_I32 and dtype <= C.LC_U8)
  local texts, width = map_texts(values, format), 0
  local function measure(t)
    for i = 1, #t do
      if type(t[i]) == "table" then measure(t[i]) elseif #t[i] > width then width = #t[i] end
    end
  end
  measure(texts)
  if factor then lines[1] = lines[1] .. ("  times %.0e"):format(factor) end
  if #shape == 1 then
    local one = row_text(texts, lists[1], any and width or 0)
    if #one + #lines[1] <= 100 then
      lines[1] = lines[1] .. "   " .. row_text(texts, lists[1], 0)
    else
      lines[#lines + 1] = "  " .. row_text(texts, lists[1], width)
    end
  elseif #shape == 2 then
    matrix_lines(texts, lists[1], lists[2], width, lines)
  else
    block_lines(texts, lists, 1, {}, width, lines)
  end
  if any then lines[#lines + 1] = statistics(x) end
end

function M.format(x)
  if C.lc_alive(x) == 0 then return "tensor (released: its scope ended, or it was dropped)" end
  local shape = fields.shape(x)
  local lines = {header(x)}
  if C.lc_dtype_of(x) >= LC_FIRST_QUANTISED then
    return lines[1] .. "  (quantised; x:float() shows the values)"
  elseif #shape == 0 then
    return M.number(methods.item(x)) .. (fields.requires_grad(x) and "  (requires grad)" or "")
  elseif methods.numel(x) == 0 then
    return lines[1] .. "   (no elements)"
  end
  scope.scope(scope.no_grad, body, x, lines)
  return table.concat(lines, "\n")
end

bridge.meta.__tostring = M.format
tensor.header = header

return M
