-- harness.lua: the few words that the tests written in Lua share. A test file is a plain script:
--   local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua") ... t.test(name, f) ... t.finish()
local t = {passed = 0, failed = 0, skipped = 0}

local function fail(level, format, ...) error(format:format(...), level + 1) end

-- Runs f; what it raises is a failure with the name.
function t.test(name, f)
  local ok, problem = xpcall(f, function(e)
    if type(e) == "table" or os.getenv("LOLCATS_TRACE") ~= "full" then return tostring(e) end
    return debug.traceback(tostring(e), 2)
  end)
  if ok then
    t.passed = t.passed + 1
  else
    t.failed = t.failed + 1
    io.stdout:write("FAILED  ", name, "\n        ", (problem:gsub("\n", "\n        ")), "\n")
  end
end

function t.skip(name, why)
  t.skipped = t.skipped + 1
  io.stdout:write("skipped ", name, ": ", why, "\n")
end

local function show(v)
  if type(v) ~= "table" then return type(v) == "string" and ("%q"):format(v) or tostring(v) end
  local parts = {}
  for k, x in pairs(v) do parts[#parts + 1] = (type(k) == "number" and "" or tostring(k) .. "=") .. show(x) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

local function same(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then return a == b end
  for k, v in pairs(a) do
    if not same(v, b[k]) then return false end
  end
  for k in pairs(b) do
    if a[k] == nil then return false end
  end
  return true
end

-- Equal, tables by content.
function t.eq(a, b, what)
  if not same(a, b) then fail(2, "%s%s expected, got %s", what and what .. ": " or "", show(b), show(a)) end
end

function t.ok(v, what)
  if not v then fail(2, "%s", what or "true expected") end
end

local function flat(v, out)
  if type(v) == "cdata" then v = v:totable() end
  if type(v) == "number" then out[#out + 1] = v return out end
  for i = 1, #v do flat(v[i], out) end
  return out
end

-- Numbers, nested tables or tensors, equal within tol relative to the largest entry of b (at least 1).
function t.close(a, b, tol, what)
  local x, y = flat(a, {}), flat(b, {})
  if #x ~= #y then fail(2, "%s%d values expected, got %d", what and what .. ": " or "", #y, #x) end
  local scale = 1
  for i = 1, #y do scale = math.max(scale, math.abs(y[i])) end
  for i = 1, #y do
    if not (x[i] == y[i] or math.abs(x[i] - y[i]) <= (tol or 1e-5) * scale) then
      fail(2, "%svalue %d: %.9g expected, got %.9g", what and what .. ": " or "", i, y[i], x[i])
    end
  end
end

-- f must raise something whose text matches the Lua pattern; returns it.
function t.errors(f, pattern, ...)
  local ok, problem = pcall(f, ...)
  if ok then fail(2, "an error matching '%s' expected, nothing was raised", pattern) end
  if not tostring(problem):find(pattern) then
    fail(2, "an error matching '%s' expected, got: %s", pattern, tostring(problem))
  end
  return problem
end

-- n token ids below vocab, the same for the same seed (1).
function t.ids(n, vocab, seed)
  local out, s = {}, seed or 1
  for i = 1, n do
    s = (s * 48271) % 2147483647
    out[i] = s % vocab
  end
  return out
end

-- Gradients of a loss for a list of leaves, as a list; zeros where one takes no part.
function t.gradients(list, loss)
  local lc = require "lolcats"
  for _, p in ipairs(list) do p:zero_grad() end
  loss:backward()
  local out = {}
  for i, p in ipairs(list) do out[i] = p.grad and p.grad:clone() or lc.zeros_like(p) end
  return out
end

-- Where real data lies: LOLCATS_TEST_DATA, else ../shared of the working directory if it is there; nil otherwise.
function t.data(path)
  local root = os.getenv("LOLCATS_TEST_DATA") or "../shared"
  local file = io.open(root .. "/" .. path)
  if not file then return nil end
  file:close()
  return root .. "/" .. path
end

-- Prints the count and ends the script; its status is 1 when something failed.
function t.finish()
  io.stdout:write(("%d passed, %d failed"):format(t.passed, t.failed),
                  t.skipped > 0 and (", %d skipped"):format(t.skipped) or "", "\n")
  if t.failed > 0 then os.exit(1) end
end

return t
