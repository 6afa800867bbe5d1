-- adapters.lua: adapter folders that tests/peers/adapters.py wrote, against the logits of PEFT; merged, taken out again,
-- written and read again; those that must be refused; and folders of ours (ours_*) for PEFT to read.
--   lolcats tests/peers/adapters.lua FOLDER
local lc = require "lolcats"
local files = require "lolcats.files"
local folder = arg and arg[1] or ""
local failed, passed = 0, 0

local function check(name, ok, text)
    if ok then passed = passed + 1 else failed = failed + 1; print("FAIL  " .. name .. ": " .. tostring(text)) end
end

local function compare(name, got, want, limit)
    local d = lc.scope(function() return (got:to("f64") - want:to("f64")):abs():amax():item() end)
    check(name, d <= limit, ("differs by %.3g, allowed %.3g"):format(d, limit))
end

local function logits(model, ids) return lc.no_grad(function() return model:logits(ids) end) end

local function base_name(dir) return files.read(dir .. "/base"):match "%S+" end

-- Writes the model's adapter for PEFT, with our logits.
local function give(name, model, ids, base)
    local out = folder .. "/ours_" .. name
    model:save_adapter(out)
    files.write(out .. "/base", base)
    files.save_tensors(out .. "/expected.safetensors", { ids = lc.tensor(ids, { dtype = "i32" }), logits = logits(model, ids):to "f64" })
    return out
end

local function read_case(name)
    local dir = folder .. "/" .. name
    local t = files.open_tensors(dir .. "/expected.safetensors")
    local ids, want, base = t:tensor("ids"):totable(), t:tensor "logits", base_name(dir)
    -- rotary tables and norms are float32 in there
    local model = lc.load(folder .. "/" .. base, { dtype = "f64" })
    local plain = logits(model, ids)
    model:load_adapter(dir)
    compare(name, logits(model, ids), want, 1e-5)
    local mine = logits(model, ids)
    local again = lc.load(folder .. "/" .. base, { dtype = "f64" })
    again:load_adapter(give(name, model, ids, base))
    compare(name .. " written and read", logits(again, ids), mine, 1e-10)
    again:merge_lora()
    compare(name .. " merged", logits(again, ids), mine, 1e-10)
    again:save_weights(dir .. "/merged")
    compare(name .. " merged, saved and read", logits(lc.load(dir .. "/merged", { dtype = "f64" }), ids), mine, 1e-10)
    again:unmerge_lora()
    compare(name .. " taken out and on", logits(again, ids), mine, 1e-10)
    if not model.trained_weights then
        lc.lora.drop(again)
        compare(name .. " dropped", logits(again, ids), plain, 1e-10)
    end
    local f32 = lc.load(dir, { base = folder .. "/" .. base })
    compare(name .. " f32", logits(f32, ids), want, 1e-4)
    t:close()
end

-- Made here from nothing, by options of add_lora.
local MADE = {
    made_plain = { rank = 3, alpha = 7 },
    made_rslora = { rank = 4, alpha = 2, rslora = true, targets = "all-linear" },
    made_regex = { rank = 4, targets = [[.*layers\.(0|2)\..*(gate|q)_proj]] },
    made_patterns = { rank = 4, alpha = 8, rank_pattern = { k_proj = 2, ["model.layers.1.self_attn.q_proj"] = 5 }, alpha_pattern = { v_proj = 1 } },
    made_layers = { rank = 2, layers = { 1, -1 }, targets = { "mlp.down_proj" } },
    made_modules = { rank = 2, modules_to_save = { "lm_head", "norm" } },
    made_ends = { rank = 2, targets = { "lm_head", "embed_tokens", "q_proj" } },
}

local function made_case(name, opts)
    lc.manual_seed(11)
    local model = lc.load(folder .. "/base", { dtype = "f64" })
    model:add_lora(opts)
    lc.no_grad(function()
        for _, p in ipairs(lc.lora.saved(model)) do p.tensor:detach():add_(lc.randn(p.tensor.shape, { dtype = "f64" }) * 0.2) end
    end)
    local ids = { { 3, 8, 5, 1, 44, 60, 7, 7 }, { 9, 2, 0, 13, 21, 5, 33, 1 } }
    give(name, model, ids, "base")
    local loss = model:loss(ids)
    loss:backward()
    for _, p in ipairs(model:trainable()) do check(name .. ": gradient of " .. p.name, p.tensor.grad, "there is none") end
end

for _, name in ipairs(files.list(folder)) do
    local dir = folder .. "/" .. name
    if name:match "^refuse_" then
        local ok, err = pcall(function() lc.load(folder .. "/base"):load_adapter(dir) end)
        check(name, not ok and tostring(err):find("support", 1, true) or tostring(err):find("changes the base", 1, true), err)
    elseif files.exists(dir .. "/expected.safetensors") and not name:match "^ours_" then
        lc.scope(read_case, name)
    end
end
for name, opts in pairs(MADE) do lc.scope(made_case, name, opts) end
print(("%d passed, %d failed"):format(passed, failed))
os.exit(failed == 0 and passed > 0 and 0 or 1)
