-- lc.record: work on a device recorded once and run again with one call, which spares the host its calls and the device
-- the gaps between them.
local bridge = require "lolcats.core.ffi"
local scope = require "lolcats.core.scope"
local tensor = require "lolcats.core.tensor"
local ffi, C = bridge.ffi, bridge.C
local M = {}

local out = ffi.new("lc_graph *[1]")

local Graph = {}
Graph.__index = Graph

--- Runs it: what the function's ops did, on the same memory, with the same plain numbers.
function Graph:run()
  if not self.handle then bridge.fail("record: this graph was dropped") end
  bridge.check(C.lc_graph_run(self.handle), "record")
end

--- Gives its memory back; its results are gone with it.
function Graph:drop()
  if not self.handle then return end
  C.lc_graph_free(ffi.gc(self.handle, nil))
  self.handle = nil
  scope.walk(self.results, function(x) x:drop() end)
  self.results = {}
end

--- lc.rehearse(device, f, ...): f(...), and before its results how many bytes it needed at once. A recording of the same work
--- is told with lc.record_room: memory for it is then one piece of about that size, instead of the most of each size of block.
function M.rehearse(device, f, ...)
  local id = tensor.device_id(device)
  bridge.check(C.lc_memory_mark(id), "rehearse")
  local function after(...) return C.lc_memory(id, "rise"), ... end
  return after(f(...))
end
function M.record_room(bytes) C.lc_graph_room(bytes) end

--- lc.record(device, f, ...): calls f with the device recording: ops do nothing yet, and copies from and to the host
--- fail. Returns a graph, whose run() does the work and whose `results` are f's, or nil and the reason where the device
--- records none. Plain numbers are recorded as they are; what changes from run to run must lie on the device. Tensors
--- that f reads must live as long as the graph, and are written and read where they lie.
function M.record(device, f, ...)
  if C.lc_graph_begin(tensor.device_id(device)) ~= 0 then return nil, ffi.string(C.lc_error_message()) end
  local results = { pcall(scope.no_grad, scope.scope, f, ...) }
  if not results[1] then
    C.lc_graph_end(nil)
    error(results[2], 0)
  end
  local graph = setmetatable({ results = { unpack(results, 2) } }, Graph)
  scope.keep(graph.results)
  if C.lc_graph_end(out) ~= 0 then return nil, ffi.string(C.lc_error_message()) end
  graph.handle = ffi.gc(out[0], C.lc_graph_free)
  return graph
end

return M
