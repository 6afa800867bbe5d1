-- test_cuda_graph.lua: decoding by recorded steps on a device gives, bit for bit, what single calls give, at batch 1 and more, over
-- several windows, while other tensors come and go; and a session's tokens are the same. The device is LOLCATS_DEVICE, or emulated:0 if it
-- is there (which records no graphs: then steps are single calls).
local lc = require "lolcats"
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local decode = require "lolcats.decode"
local device = os.getenv "LOLCATS_DEVICE" or "emulated:0"
if not lc.has_device(device) then
  print("skipped: there is no device " .. device)
  os.exit(77)
end
local small = device:match "^emulated"

local config = {model_type = "mistral", hidden_size = small and 64 or 512, intermediate_size = small and 96 or 1408, num_hidden_layers = 2,
                num_attention_heads = small and 1 or 8, num_key_value_heads = small and 1 or 2, head_dim = 64, vocab_size = 250,
                rms_norm_eps = 1e-5, rope_theta = 10000, tie_word_embeddings = false, max_position_embeddings = 4096}
lc.manual_seed(1)
local student = lc.linearize(lc.model(config, {dtype = "bf16", device = device}), {map = "hedgehog", window = small and 4 or 64})
local steps = small and 6 or 200

local function run(batch, recorded, state_dtype)
  local ids = lc.keep(lc.zeros({batch, 1}, {dtype = "i32", device = device}))
  local state, out = student:new_state(batch, {state_dtype = state_dtype}), {}
  local prompt = {}
  for i = 1, batch do prompt[i] = {i, 2 * i, 3, 4, 5} end
  student:forward(prompt, {state = state})
  local decoder = decode.new(student, state, ids, function(x)
    local logits = student:lm_head(x)
    ids:copy_(logits:argmax(-1):reshape(-1, 1))
    return logits
  end)
  decoder.records = recorded
  for i = 1, steps do
    local noise = lc.keep(lc.full({batch, 250}, i, {device = device}))
    out[i] = lc.keep(decoder:step():to "cpu":to "f32")
    t.eq(noise:to("cpu"):amax():item(), i)
    noise:drop()
  end
  if recorded and not small then t.ok(decoder.graph, "steps were not recorded") end
  student:drop_state(state)
  return lc.stack(out)
end

for _, batch in ipairs {1, 3} do
  t.test("recorded steps of " .. batch .. " rows", function()
    t.close(run(batch, true), run(batch, false), 0)
    if not small then t.close(run(batch, true, "bf16"), run(batch, false, "bf16"), 0) end
  end)
end

t.test("a session's tokens", function()
  local function tokens(n)
    local _, ids = student:session():generate({1, 2, 3}, {max_new = n})
    return ids
  end
  local long = tokens(steps)
  t.eq(#long, steps)
  for n = 1, math.min(8, steps) do t.eq(tokens(n), {unpack(long, 1, n)}) end
end)

t.finish()
