-- lolcats: the public table, `local lc = require "lolcats"`. Holds names only: ops and tensors at once, every other
-- module when one of its names is first used. A name that does not exist is an error with a suggestion.
local bridge = require "lolcats.core.ffi"
local ops = require "lolcats.core.ops"
local tensor = require "lolcats.core.tensor"
local scope = require "lolcats.core.scope"
local autograd = require "lolcats.core.autograd"
local einsum = require "lolcats.core.einsum"
local system = require "lolcats.core.system"
require "lolcats.core.print"

local lc = {}
package.loaded["lolcats"] = lc -- modules below may require us while we load

for name, f in pairs(ops.functions) do lc[name] = f end
for _, name in ipairs(tensor.names) do lc[name] = tensor[name] end
for _, name in ipairs {"zeros", "empty", "ones", "rand", "randn", "full", "arange", "eye", "tensor", "zeros_like",
                       "empty_like", "ones_like",
                       "rand_like", "randn_like", "full_like", "cat", "stack", "to", "default_dtype", "default_device"} do
  lc[name] = tensor[name]
end
for _, name in ipairs {"scope", "keep", "param", "no_grad", "enable_grad", "grad_enabled"} do lc[name] = scope[name] end
for _, name in ipairs {"custom", "checkpoint", "backward", "rng_state", "set_rng_state", "manual_seed"} do
  lc[name] = autograd[name]
end
for name, v in pairs(system) do lc[name] = v end
local graph = require "lolcats.core.graph"
lc.record, lc.rehearse, lc.record_room = graph.record, graph.rehearse, graph.record_room
lc.einsum, lc.rearrange = einsum.einsum, einsum.rearrange
lc.is_tensor, lc.fail, lc.is_error = bridge.is_tensor, bridge.fail, bridge.is_error

-- Names of other modules: lc.NAME = {module, field}; without a field, the module itself.
local elsewhere = {
  files = {"lolcats.files"},
  text = {"lolcats.text"},
  tokenizer = {"lolcats.text", "tokenizer"},
  nn = {"lolcats.nn"},
  lora = {"lolcats.lora"},
  peft = {"lolcats.peft"},
  hub = {"lolcats.hub"},
  plot = {"lolcats.plot"},
  optim = {"lolcats.optim"},
  eval = {"lolcats.eval"},
  feature_map = {"lolcats.feature_map", "feature_map"},
  check = {"lolcats.feature_map", "check"},
  linearize = {"lolcats.linearize", "linearize"},
  blockwise = {"lolcats.blockwise", "new"},
  load = {"lolcats.models", "load"},
  model = {"lolcats.models", "new"},
  session = {"lolcats.session", "new"},
  chat = {"lolcats.session", "chat"},
  args = {"lolcats.cli", "args"},
  required = {"lolcats.cli", "required"},
  args_of = {"lolcats.cli", "args_of"},
  trust_code = {"lolcats.cli", "trust_code"},
  doctor = {"lolcats.doctor", "run"},
  help = {"lolcats.help", "show"},
  run = {"lolcats.train", "run"},
  train = {"lolcats.train"},
  data = {"lolcats.data", "data"},
  recipe = {"lolcats.recipe", "load"},
  configs = {"lolcats.configs"},
  adamw = {"lolcats.optim", "adamw"},
  adam = {"lolcats.optim", "adam"},
  sgd = {"lolcats.optim", "sgd"},
  adafactor = {"lolcats.optim", "adafactor"},
  constant = {"lolcats.optim", "constant"},
  linear_decay = {"lolcats.optim", "linear_decay"},
  cosine = {"lolcats.optim", "cosine"},
  timm_cosine = {"lolcats.optim", "timm_cosine"},
  plateau = {"lolcats.optim", "plateau"},
}

-- __names: for completion and help, which must not load a module to know its name
setmetatable(lc, {__names = elsewhere, __index = function(t, name)
  local entry = elsewhere[name]
  if not entry then
    local near = type(name) == "string" and bridge.nearest(name, t, elsewhere)
    bridge.fail("lc has no '%s'%s", tostring(name), near and (" (did you mean '%s'?)"):format(near) or "")
  end
  local value = require(entry[1])
  if entry[2] then value = value[entry[2]] end
  rawset(t, name, value)
  return value
end})

return lc
