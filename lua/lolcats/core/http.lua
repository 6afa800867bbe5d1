-- HTTP over FFI: a client whose requests run side by side while Lua waits, and what files of a download need: SHA-256 of
-- a file, links, free space. Redirects, tokens and retries are the Hub client's (lua/lolcats/hub).
local bridge = require "lolcats.core.ffi"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

local id_out, length_out, size_out = ffi.new("int32_t[1]"), ffi.new("int32_t[1]"), ffi.new("double[1]")
local hex_out = ffi.new("char[65]")

local Client = {}
Client.__index = Client

-- A client; raises EIO where there is no libcurl. agent: how the program calls itself.
function M.client(agent)
  local out = ffi.new("lc_http *[1]")
  check(C.lc_http_open(out, agent), "http")
  return setmetatable({handle = ffi.gc(out[0], C.lc_http_close)}, Client)
end

function Client:close()
  if self.handle then C.lc_http_close(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

-- Begins a request and returns its number. headers: a list of lines; path: the file that the answer's body continues.
function Client:start(method, url, headers, path)
  for _, text in ipairs {url, path or "", unpack(headers)} do
    if text:find("[%z\r\n]") then bridge.fail("a request cannot hold a line break: %q", text) end
  end
  check(C.lc_http_start(self.handle, id_out, method, url, table.concat(headers, "\n"), path), "http")
  return id_out[0]
end

-- The number of a request that ended, once each; nil when none did in this time.
function Client:wait(seconds)
  check(C.lc_http_wait(self.handle, seconds, id_out), "http")
  if id_out[0] >= 0 then return id_out[0] end
end

function Client:status(id) return C.lc_http_status(self.handle, id) end
function Client:problem(id)
  local text = ffi.string(C.lc_http_error(self.handle, id))
  if text ~= "" then return text end
end
function Client:header(id, name)
  local p = C.lc_http_header(self.handle, id, name, length_out)
  if p ~= nil then return ffi.string(p, length_out[0]) end
end
function Client:redirect(id)
  local p = C.lc_http_redirect(self.handle, id)
  if p ~= nil then return ffi.string(p) end
end
function Client:body(id)
  local p = C.lc_http_body(self.handle, id, size_out)
  return ffi.string(p, size_out[0])
end
function Client:bytes(id) return C.lc_http_bytes(self.handle, id) end
-- Brings the file to the disk and returns its SHA-256.
function Client:sync(id)
  check(C.lc_http_sync(self.handle, id, hex_out), "http")
  return ffi.string(hex_out)
end
function Client:finish(id) C.lc_http_end(self.handle, id) end

function M.sha256_file(path)
  check(C.lc_sha256_file(path, hex_out), "sha256")
  return ffi.string(hex_out)
end

function M.make_link(target, path) check(C.lc_make_link(target, path), "make_link") end

-- Bytes that may be written in a folder, nil when that is not known.
function M.disk_free(path)
  local n = C.lc_disk_free(path)
  if n >= 0 then return n end
end

return M
