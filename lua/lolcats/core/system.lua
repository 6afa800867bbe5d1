-- The machine and the runtime as Lua asks about them: devices, threads, memory counters, switches, the profile.
local bridge = require "lolcats.core.ffi"
local tensor = require "lolcats.core.tensor"
local scope = require "lolcats.core.scope"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

local function text_of(p) return p ~= nil and ffi.string(p) or nil end

M.version = text_of(C.lc_version())
function M.now() return C.lc_now() end
function M.peak_rss() return C.lc_peak_rss() end
function M.interrupted() return C.lc_interrupt ~= 0 end
function M.clear_interrupt() C.lc_interrupt = 0 end

-- ---- devices ------------------------------------------------------------------------------------------------------
function M.devices()
  local list = {}
  for id = 0, C.lc_device_count() - 1 do
    list[id + 1] = {name = text_of(C.lc_device_name(id)), describe = text_of(C.lc_device_describe(id))}
  end
  return list
end

function M.has_device(name) return C.lc_device_find(name) >= 0 end
-- "cuda:0" when its plugin is in use, else "cpu".
function M.best_device() return M.has_device("cuda:0") and "cuda:0" or "cpu" end
function M.plugin_why(kind) return text_of(C.lc_plugin_why(kind)) end
function M.load_plugin(path) check(C.lc_load_plugin(path), "load_plugin") end
function M.sync(device) check(C.lc_device_sync(tensor.device_id(device)), "sync") end

-- ---- CPU ----------------------------------------------------------------------------------------------------------
function M.threads(n) return C.lc_threads(n or 0) end
function M.cpu_isa(force) return text_of(C.lc_cpu_isa(force)) end
function M.cpu_gemm(force) return text_of(C.lc_cpu_gemm(force)) end
function M.cpu_gemm_why() return text_of(C.lc_cpu_gemm_why()) end

-- ---- memory -------------------------------------------------------------------------------------------------------
-- lc.memory("live" | "cached" | "peak" | "limit" | "free" | "total"[, device]): bytes; without a word, the first four in a
-- table. free and total are a GPU's own (0: not known), free with what is cached here.
function M.memory(what, device)
  local id = tensor.device_id(device)
  if what == nil then
    return {live = C.lc_memory(id, "live"), cached = C.lc_memory(id, "cached"), peak = C.lc_memory(id, "peak"),
            limit = C.lc_memory(id, "limit")}
  end
  local bytes = type(what) == "string" and C.lc_memory(id, what) or -1
  if bytes < 0 then bridge.fail("memory: '%s' is not one of live, cached, peak, limit, free, total", tostring(what)) end
  return bytes
end
function M.reset_peak(device) check(C.lc_memory_reset_peak(tensor.device_id(device)), "reset_peak") end
function M.memory_limit(bytes, device)
  check(C.lc_memory_limit(tensor.device_id(device), bytes or 0), "memory_limit")
end
-- Runs finalisers, then gives cached blocks back to the system.
function M.trim() bridge.reclaim() end

-- ---- switches -----------------------------------------------------------------------------------------------------
local function switch_value(v) return v == true and 1 or v == false and 0 or v end

-- lc.set_option("plain_attention", true): returns the old value.
function M.set_option(name, value)
  local old = C.lc_get_option(name)
  check(C.lc_set_option(name, switch_value(value)), "set_option")
  return old
end
function M.get_option(name)
  local v = C.lc_get_option(name)
  if v < 0 then bridge.fail("no option '%s'", tostring(name)) end
  return v
end

-- lc.check_finite(true): every op's results are looked at; the first bad one raises ENONFINITE.
function M.check_finite(on) return C.lc_check_finite(on and 1 or 0) ~= 0 end

-- lc.profile(f, ...): runs f, returns the report of its ops and then f's results.
function M.profile(f, ...)
  C.lc_profile(1)
  local function finish(ok, ...)
    C.lc_profile(0)
    if not ok then error((...), 0) end
    return text_of(C.lc_profile_report()), ...
  end
  return finish(pcall(f, ...))
end

M.scope_depth = function() return bridge.depth[0] end
M.at_scope_end = scope.at_end

return M
