-- doctor.lua: what this program found on this machine: processor, libraries, devices and why not, memory, caches. For
-- people who ask why it is slow or why it does not find something; changes nothing.
local program = require "lolcats.program"
local doctor = {}

local function read_file(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read("*a")
  file:close()
  return text
end

local function mb(kb) return ("%.1f GB"):format(kb / 2 ^ 20) end

local function processor()
  local info = read_file("/proc/cpuinfo") or ""
  local _, n = info:gsub("\nprocessor%s*:", "")
  return (info:match("model name%s*:%s*([^\n]*)") or "unknown processor"), n + (info:match("^processor%s*:") and 1 or 0)
end

local function memory()
  local info = read_file("/proc/meminfo") or ""
  local total, free = tonumber(info:match("MemTotal:%s*(%d+)")), tonumber(info:match("MemAvailable:%s*(%d+)"))
  local text = total and ("%s, %s available"):format(mb(total), mb(free or 0)) or "unknown"
  local limit = tonumber(read_file("/sys/fs/cgroup/memory.max") or "")
  if limit and total and limit / 1024 < total then text = text .. ", limited to " .. mb(limit / 1024) end
  return text
end

-- The shared libraries in use, by the names they are mapped under.
local function libraries()
  local wanted = {
    ["yaml-0"] = true, z = true, yajl = true, ["pcre2-8"] = true, utf8proc = true, edit = true, dnnl = true,
    ["luajit-5.1"] = true,
  }
  local seen, list = {}, {}
  for name, version in (read_file("/proc/self/maps") or ""):gmatch("/lib([%w%-%.]-)%.so([%d%.]*)\n") do
    if wanted[name] and not seen[name] then
      seen[name] = true
      list[#list + 1] = name .. " " .. version:gsub("^%.", "")
    end
  end
  table.sort(list)
  if not seen["luajit-5.1"] then list[#list + 1] = "luajit inside" end
  return table.concat(list, ", ")
end

local function folder_state(path)
  local ok = program.list_dir(path)
  if not ok then return path .. " (not there yet)" end
  return ("%s (%d entries)"):format(path, #ok)
end

local function env(name)
  local v = os.getenv(name)
  if v and v ~= "" then return v end
end

-- {title, text} pairs.
function doctor.report()
  local lc = require "lolcats"
  local rows = {}
  local function put(title, text, ...)
    rows[#rows + 1] = {title, select("#", ...) > 0 and text:format(...) or text}
  end
  put("program", "lolcats %s, %s%s", lc.version, jit.version, jit.status() and "" or ", JIT off")
  put("", program.path)
  put("Lua files", program.tree and "from the source tree " .. program.tree or "the ones inside the program")
  local model, n = processor()
  put("processor", "%s, %d logical", model, n)
  put("threads", "%d (LOLCATS_THREADS changes it)", lc.threads())
  put("vectors", "%s", lc.cpu_isa())
  put("products", "%s: %s", lc.cpu_gemm(), lc.cpu_gemm_why())
  put("memory", memory())
  for _, device in ipairs(lc.devices()) do put("device", "%s: %s", device.name, device.describe) end
  local why = lc.plugin_why("cuda")
  if why ~= "" then put("no GPU", "%s", why) end
  put("libraries", "%s", libraries())
  local home = env "HOME" or "."
  local cache = env "XDG_CACHE_HOME" or home .. "/.cache"
  put("cache", "%s", folder_state(cache .. "/lolcats"))
  put("Hub cache", "%s", folder_state(require("lolcats.hub").hf_cache()))
  put("history", "%s", (env "XDG_STATE_HOME" or home .. "/.local/state") .. "/lolcats/history")
  return rows
end

-- One line for the greeting of a session.
function doctor.line()
  local lc = require "lolcats"
  local parts = {(jit.version:gsub("%.0%-.*", ""))}
  for _, device in ipairs(lc.devices()) do parts[#parts + 1] = ("%s %s"):format(device.name, device.describe) end
  return table.concat(parts, "  ")
end

-- Prints the report.
function doctor.run()
  for _, row in ipairs(doctor.report()) do io.stdout:write(("%-10s %s\n"):format(row[1], row[2])) end
end

return doctor
