-- models.lua: models that tests/peers/models.py wrote, against the logits of transformers: one forward, and a prefill
-- with single steps after it, in float64 and float32; saved again and read again; then linearized with adapters.
--   lolcats tests/peers/models.lua FOLDER
local lc = require "lolcats"
local files = require "lolcats.files"
local folder = arg and arg[1] or ""
local failed, passed = 0, 0

local function check(name, ok, text)
    if ok then passed = passed + 1 else failed = failed + 1; print("FAIL  " .. name .. ": " .. text) end
end

local function compare(name, got, want, limit)
    local d = lc.scope(function()
        return (got:to("f64") - want):abs():amax():item() / want:abs():amax():item()
    end)
    check(name, d <= limit, ("differs by %.3g of the largest, allowed %.3g"):format(d, limit))
end

-- Logits of a prefill of `first` and steps of one.
local function stepped(model, ids, first)
    local state, rows, n = model:new_state(#ids), {}, #ids[1]
    local at = 1
    while at <= n do
        local part, len = {}, at == 1 and first or 1
        for r = 1, #ids do
            part[r] = {}
            for i = at, at + len - 1 do part[r][#part[r] + 1] = ids[r][i] end
        end
        rows[#rows + 1] = lc.no_grad(function() return model:lm_head(model:forward(part, { state = state })) end)
        at = at + len
    end
    model:drop_state(state)
    return lc.cat(rows, 2)
end

local function student_of(model, name, ids)
    local student = lc.linearize(model, { map = "hedgehog", window = 4 })
    student:transfer(ids)
    for _, p in ipairs(student:map_params()) do
        check(name .. " gradient of " .. p.name, p.tensor.grad ~= nil, "there is none")
    end
    student:use_linear()
    student:add_lora { rank = 3, targets = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" } }
    lc.no_grad(function()
        for _, p in ipairs(lc.lora.parameters(student)) do p.tensor:detach():normal_(0, 0.1) end
    end)
    local whole = lc.no_grad(function() return student:logits(ids) end)
    compare(name .. " student, stepped", stepped(student, ids, 13), whole:to "f64", 1e-10)
    local dir = folder .. "/saved_student"
    student:save(dir)
    local again = lc.linearize(model, { map = "hedgehog", window = 4 })
    again = require("lolcats.linearize").load(dir, { base = model, dtype = "f64" })
    compare(name .. " student read again", lc.no_grad(function() return again:logits(ids) end), whole:to "f64", 1e-6)
    student:merge_lora()
    compare(name .. " student, adapters merged", lc.no_grad(function() return student:logits(ids) end), whole:to "f64", 1e-10)
end

for _, name in ipairs(files.list(folder)) do
    local dir = folder .. "/" .. name
    if files.exists(dir .. "/expected.safetensors") then
        lc.scope(function()
            local t = files.open_tensors(dir .. "/expected.safetensors")
            local ids, want, steps = t:tensor("ids"):totable(), t:tensor "logits", t:tensor "logits.steps"
            local gguf = name:match "_gguf$" ~= nil -- whose base, factors and epsilon are float32
            for _, dtype in ipairs { "f64", "f32" } do
                -- transformers makes the base of dynamic scaling in float32
                local limit = dtype == "f64" and (gguf and 2e-5 or name:match "dynamic$" and 1e-6 or 1e-10) or 2e-5
                local model = lc.load(dir .. (gguf and "/model.gguf" or "/model.safetensors"), { dtype = dtype })
                compare(name .. " " .. dtype, lc.no_grad(function() return model:logits(ids) end), want, limit)
                compare(name .. " stepped " .. dtype, stepped(model, ids, 13), steps, limit)
                if dtype == "f64" then
                    model:save_weights(dir .. "/saved")
                    local again = lc.load(dir .. "/saved", { dtype = dtype })
                    compare(name .. " saved", lc.no_grad(function() return again:logits(ids) end), want, limit)
                    if not name:match "dynamic$" and not name:match "longrope" then student_of(model, name, ids) end
                end
            end
            t:close()
        end)
    end
end
print(("%d passed, %d failed"):format(passed, failed))
os.exit(failed == 0 and passed > 0 and 0 or 1)
