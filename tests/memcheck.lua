-- memcheck.lua: a transfer step, a LoRA step and a decode, small enough for valgrind: what the sanitizers do not see (memory that was
-- never written, the program's own arena) it does. Run by ctest under valgrind where that is installed.
local lc = require "lolcats"
local files = lc.files

local CONFIG = {architectures = {"LlamaForCausalLM"}, model_type = "llama", hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2,
                num_attention_heads = 4, num_key_value_heads = 2, vocab_size = 61, rms_norm_eps = 1e-5, rope_theta = 10000,
                tie_word_embeddings = false, max_position_embeddings = 256, hidden_act = "silu"}

local function rows(n, length)
  local out = {}
  for r = 1, n do
    out[r] = {}
    for i = 1, length do out[r][i] = (r * 31 + i * i * 7 + i) % 61 end
  end
  return out
end

local folder = os.tmpname()
os.remove(folder)
lc.manual_seed(5)
lc.model(CONFIG, {dtype = "f32"}):save_weights(folder) -- through a file, both ways
local teacher = lc.load(folder)
for _, name in ipairs {"model.safetensors", "config.json"} do files.remove(folder .. "/" .. name) end
os.remove(folder)

for _, map in ipairs {"hedgehog", "t2r"} do
  local student = lc.linearize(teacher, {map = map, window = 8})
  local params = {}
  for i, p in ipairs(student:map_params()) do params[i] = p end
  local optim = lc.adamw {lr = 0.01}
  optim:attach(params)
  print(map, "transfer", student:transfer(rows(2, 37)))
  optim:clip(1, optim:grad_norm())
  optim:step(0.01)
  student:use_linear()
  student:add_lora {rank = 2, alpha = 4}
  local loss = student:loss(rows(2, 37))
  loss:backward()
  print(map, "loss", loss:item())
  lc.no_grad(function()
    local state = student:new_state(1)
    student:logits(rows(1, 30), {state = state, last = true})
    for step = 1, 12 do
      local y = student:logits({{(step * 5) % 61}}, {state = state, last = true})
      assert(lc.count_nonfinite(y):item() == 0)
    end
  end)
end
print "1 passed, 0 failed"
