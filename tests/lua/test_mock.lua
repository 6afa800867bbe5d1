-- test_mock.lua: a whole transfer step, a LoRA step and a decode on the mock device, whose memory only kernels may open, against the
-- same on the CPU; and what becomes of a plugin that is absent, stale or out of memory.
local lc = require "lolcats"
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")

local CONFIG = {architectures = {"LlamaForCausalLM"}, model_type = "llama", hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2,
                num_attention_heads = 4, num_key_value_heads = 2, vocab_size = 61, rms_norm_eps = 1e-5, rope_theta = 10000,
                tie_word_embeddings = false, max_position_embeddings = 256, hidden_act = "silu"}

if not pcall(function() return lc.zeros({1}, {device = "mock:0"}) end) then
  t.skip("mock device", "its plugin is not beside the program")
  t.finish()
  return
end

local function rows(n, length)
  local out = {}
  for r = 1, n do
    out[r] = {}
    for i = 1, length do out[r][i] = (r * 31 + i * i * 7 + i) % 61 end
  end
  return out
end

local function run(device)
  local out = {}
  lc.manual_seed(5)
  local cpu = lc.model(CONFIG, {dtype = "f32"})
  local teacher = lc.model(CONFIG, {dtype = "f32", device = device})
  for i, p in ipairs(teacher:params()) do
    lc.no_grad(function() p.tensor:copy_(cpu:params()[i].tensor:detach():to(device)) end)
  end
  local student = lc.linearize(teacher, {map = "hedgehog", window = 8})
  out.transfer = student:transfer(rows(1, 37))
  for _, p in ipairs(student:map_params()) do out[p.name] = p.tensor.grad:to("cpu") end
  student:use_linear()
  lc.manual_seed(9)
  student:add_lora {rank = 2, alpha = 4}
  local loss = student:loss(rows(1, 37))
  loss:backward()
  out.loss = loss:to("cpu"):detach()
  for _, p in ipairs(student:params("lora", true)) do
    if p.name:match "lora_B" then out[p.name] = p.tensor.grad:to("cpu") end
  end
  lc.no_grad(function()
    local ids, state = rows(1, 30), student:new_state(1)
    out.prefill = lc.keep(student:logits(ids, {state = state, last = true}):to("cpu"))
    for step = 1, 12 do
      local y = student:logits({{(step * 5) % 61}}, {state = state, last = true})
      out["decode " .. step] = lc.keep(y:to("cpu"))
    end
  end)
  return out
end

t.test("a transfer step, a LoRA step and a decode give the CPU's numbers", function()
  local want, got = run "cpu", run "mock:0"
  for name, x in pairs(want) do t.close(got[name], x, 1e-5, name) end
end)

t.test("what is recorded runs again, on memory of its own", function()
  local at = {device = "mock:0"}
  local x = lc.keep(lc.zeros({1000}, at))
  local graph, why = lc.record("mock:0", function(a)
    local y = (x * 2 + a):exp()       -- temporaries go back while recording, and are taken again by what follows
    local z = (y - 1):abs()
    return z, (y + z):sum()
  end, lc.keep(lc.full({1000}, 0.5, at)))
  t.ok(graph, why)
  local before = lc.memory("live", "mock:0")
  for i = 1, 4 do
    x:fill_(i * 0.1)
    local other = lc.keep({lc.full({1000}, 7, at), lc.full({1000}, 8, at)}) -- must not take the graph's memory
    graph:run()
    local want = (lc.full({1000}, i * 0.1) * 2 + 0.5):exp()
    t.close(graph.results[1]:to "cpu", (want - 1):abs(), 1e-6)
    t.close(graph.results[2]:item(), (want + (want - 1):abs()):sum():item(), 1e-2)
    t.close(other[1]:to "cpu", lc.full({1000}, 7), 0)
    t.close(other[2]:to "cpu", lc.full({1000}, 8), 0)
  end
  graph = nil
  collectgarbage()
  collectgarbage()
  t.ok(lc.memory("live", "mock:0") < before, "a graph's memory comes back")
  t.errors(function() lc.record("mock:0", function() return lc.tensor({1, 2}, at) end) end, "")
  t.errors(function() lc.record("mock:0", function() lc.record("mock:0", function() end) error "inner" end) end, "inner")
  local none, reason = lc.record("cpu", function() end)
  t.ok(not none and reason:find "records no graphs", reason)
end)

t.test("decoding by recorded steps gives what single calls give", function()
  lc.manual_seed(3)
  local student = lc.linearize(lc.model(CONFIG, {dtype = "f32", device = "mock:0"}), {map = "hedgehog", window = 8})
  local function run(recorded)
    local ids = lc.keep(lc.zeros({2, 1}, {dtype = "i32", device = "mock:0"}))
    local state, out = student:new_state(2), {}
    student:forward(rows(2, 5), {state = state})
    local steps = require("lolcats.decode").new(student, state, ids, function(x)
      local logits = student:lm_head(x)
      ids:copy_(logits:argmax(-1):reshape(-1, 1))
      return logits
    end)
    steps.records = recorded
    for i = 1, 30 do out[i] = lc.keep(steps:step():to "cpu") end
    t.eq(steps.graph ~= nil, recorded)
    t.eq(state.seen, 35)
    student:drop_state(state)
    return lc.stack(out)
  end
  t.close(run(true), run(false), 0)
  local session = student:session()
  local _, a = session:generate({1, 2, 3}, {max_new = 20})
  local again = student:session({teacher = true})
  t.eq(#a, 20)
  local _, b = again:generate({1, 2, 3}, {max_new = 5, teacher = true})
  t.eq(#b, 5)
end)

t.test("memory that runs out: the op, its operands, who holds what; and the program goes on", function()
  local student = lc.linearize(lc.model(CONFIG, {dtype = "f32", device = "mock:0"}), {map = "hedgehog", window = 8})
  student:use_linear():add_lora {rank = 2, alpha = 4}
  local optim = lc.adamw(student:trainable(), {lr = 1e-2})
  student:learn(rows(1, 30))
  collectgarbage()
  lc.memory_limit(lc.memory("live", "mock:0") + 5e5, "mock:0")
  local ok, why = pcall(student.learn, student, rows(20, 30))
  lc.memory_limit(0, "mock:0")
  why = tostring(why)
  t.ok(not ok)
  for _, part in ipairs {"out of memory on mock:0", "MB wanted by", "limit reached", "f32%[20 x", "held there:", "for its gradient"} do
    t.ok(why:find(part), ("%s is not in: %s"):format(part, why))
  end
  collectgarbage()
  lc.memory_limit(lc.memory("live", "mock:0") + 1e4, "mock:0")
  local _, more = pcall(lc.zeros, {1000, 1000}, {device = "mock:0"})
  lc.memory_limit(0, "mock:0")
  t.ok(tostring(more):find "model.layers.%*.mlp.down_proj.weight %(2%)", tostring(more))
  t.ok(student:learn(rows(1, 30)) > 0)
  optim:step()
end)

t.test("training steps that are recorded give what single ones give", function()
  local function run(recorded)
    lc.manual_seed(7)
    local student = lc.linearize(lc.model(CONFIG, {dtype = "f32", device = "mock:0"}), {map = "hedgehog", window = 8})
    student.records = recorded
    local optim, out = lc.adamw(student:trainable(), {lr = 1e-2}), {}
    local function steps(n, step)
      for i = 1, n do
        local r = {}
        for j = 1, 37 do r[j] = (i * 17 + j * j * 5 + j) % 61 end
        out[#out + 1] = lc.scope(step, {r})
        if i % 2 == 0 then optim:clip(1); optim:step(); optim:zero_grad() end
      end
    end
    steps(9, function(r) return (student:transfer(r, {scale = 0.5})) end)
    steps(2, function(r) return student:transfer(r, {scale = 0.5, wait = false}):item() end)
    t.eq(student.recorded and student.recorded.transfer.graph ~= nil, recorded or nil)
    student:use_linear()
    t.eq(student.recorded, nil)
    student:add_lora {rank = 2, alpha = 4}
    optim = lc.adamw(student:trainable(), {lr = 1e-2})
    steps(9, function(r) return student:learn(r, nil, 0.5) end)
    steps(2, function(r) return student:learn(r, nil, 0.5, false):item() end)
    t.eq(student.recorded and student.recorded.learn.graph ~= nil, recorded or nil)
    local labels = {}
    for j = 1, 37 do labels[j] = j % 3 == 0 and -100 or j end
    steps(5, function(r) return student:learn(r, {labels}) end) -- other rows: recorded anew
    steps(2, function() return student:learn(rows(2, 12)) end)  -- another shape
    for _, p in ipairs(student:trainable()) do out[#out + 1] = p.tensor:detach():to("cpu"):abs():sum():item() end
    return lc.tensor(out)
  end
  t.close(run(true), run(false), 1e-6)
end)

t.test("a recording's memory is one piece, which outlives it while somebody holds a part", function()
  collectgarbage()
  local x = lc.keep(lc.randn({512, 1024}, {device = "mock:0"}))
  local function work() return lc.scope(function() return ((x + 1) * 2 - x):square() end) * 3 end
  local before = lc.memory("live", "mock:0")
  local room, want = lc.rehearse("mock:0", function() return lc.scope(function() return work():to "cpu" end) end)
  t.eq(room, 4 * 2 ^ 21)
  lc.record_room(room)
  local graph = lc.record("mock:0", work)
  t.ok(lc.memory("live", "mock:0") - before <= room + 2 ^ 17)
  for _ = 1, 2 do
    graph.results[1]:zero_()
    graph:run()
    t.close(graph.results[1]:to "cpu", want, 0)
  end
  local held = lc.keep(graph.results[1]:alias())
  graph:drop()
  t.close(held:to "cpu", want, 0)
  t.ok(lc.memory("live", "mock:0") - before >= room)
  held:drop()
  t.eq(lc.memory("live", "mock:0"), before)
  x:drop()
end)

t.test("values of a device are read when an update comes", function()
  local student = lc.linearize(lc.model(CONFIG, {dtype = "f32", device = "mock:0"}), {map = "hedgehog", window = 8})
  local dir = os.tmpname()
  os.remove(dir)
  local rows_of = {rows = 8, batch = function(_, list) return {ids = lc.tensor(rows(1, 20), {dtype = "i32"}), index = list[1]} end}
  local seen = {}
  local function run(name, body)
    local run = lc.run {name = name, out = dir, data = rows_of, params = student:trainable(), optim = lc.adamw {lr = 1e-3}, accumulate = 2,
                        max_steps = 2, quiet = true, seed = 1}
    for batch in run:steps() do body(run, batch) end
    return run
  end
  local r = run("a", function(run, batch)
    local loss = student:transfer(batch.ids, {scale = 0.5, wait = false})
    t.ok(lc.is_tensor(loss))
    seen[#seen + 1] = loss:item()
    run:log {mse = loss * 2}
  end)
  t.close({r.shown.mse}, {seen[3] + seen[4]}, 1e-6)
  local ok, why = pcall(run, "b", function(run, batch)
    local loss = lc.zeros({1}, {device = "mock:0"})
    run:log {mse = batch.micro == 1 and loss / 0 * 0 or loss}
    seen.bad = seen.bad or batch.index
  end)
  t.ok(not ok and tostring(why):find("mse is %-?nan at update 1 %(row " .. seen.bad .. "%)"), tostring(why))
  os.execute("rm -rf '" .. dir .. "'")
end)

t.test("operands on two devices are refused", function()
  t.errors(function() return lc.ones(2) + lc.ones({2}, {device = "mock:0"}) end, "different devices")
  t.errors(function() return lc.ones({2}, {device = "mock:0"}) + lc.ones({2}, {device = "mock:1"}) end, "different devices")
end)

t.test("an op that has no kernel for a dtype there says so", function()
  t.errors(function() return lc.ones({4}, {device = "mock:0"}):to("bf16"):exp() end, "mock:0 kernel")
end)

-- a plugin's troubles, in a program of their own
local function other(env, code)
  local f = io.popen(("%s '%s' -e '%s' 2>&1"):format(env, os.getenv "LOLCATS_PROGRAM" or "build/lolcats", code))
  local text = f:read "*a"
  f:close()
  return text
end
local TRY = [[local lc = require "lolcats" print(pcall(lc.zeros, {256, 1024}, {device = "mock:0"})) print(lc.ones(3):sum():item())]]

t.test("absent, stale, full: a reason each, and the CPU goes on", function()
  local absent = other("LOLCATS_MOCK_ABSENT=1", TRY)
  t.ok(absent:find("LOLCATS_MOCK_ABSENT is set", 1, true) and absent:find "\n3", absent)
  local stale = other("LOLCATS_MOCK_STALE=1", TRY)
  t.ok(stale:find("was built for another version", 1, true) and stale:find "\n3", stale)
  local full = other("LOLCATS_MOCK_BYTES=65536", TRY)
  t.ok(full:find("out of memory on mock:0", 1, true) and full:find "\n3", full)
end)

t.finish()
