-- peft.lua: the adapter folders among the cases of checkpoints: logits of the softmax model with each, also with the
-- adapter merged, taken out again, and written and read again.
local lc = require "lolcats"
local files = require "lolcats.files"

local function case(c, T, dir, folder, model_dir, dtype)
    local t = T.tensors(dir .. "/expected_logits.safetensors")
    local want, ids = t["logits." .. folder], t.ids:totable()
    local rel = dtype == "f64" and 1e-9 or 1e-4
    local function logits(m) return lc.no_grad(function() return m:logits(ids) end) end
    local model = lc.load(model_dir, { dtype = dtype })
    local plain = logits(model)
    model:load_adapter(dir .. "/" .. folder)
    c.close("logits", logits(model), want, rel)
    local again = os.tmpname()
    os.remove(again)
    model:save_adapter(again)
    local other = lc.load(model_dir, { dtype = dtype })
    other:load_adapter(again)
    c.close("logits after writing and reading", logits(other), want, rel)
    for _, name in ipairs(files.list(again)) do files.remove(again .. "/" .. name) end
    files.remove(again)
    model:merge_lora()
    c.close("logits with the adapter merged", logits(model), want, rel)
    model:unmerge_lora()
    c.close("logits with it taken out again and on", logits(model), want, rel)
    require("lolcats.lora").drop(model)
    c.close("logits without it", logits(model), plain, rel)
end

return function(dir, T)
    if not files.exists(dir .. "/expected_logits.safetensors") then return end
    local index = files.read_json(dir .. "/index.json")
    local name = tostring(index.model):match "^golden/(model/%S+)" or "model/llama_tied_gqa"
    local model_dir = dir .. "/../" .. name
    for _, folder in ipairs(files.list(dir)) do
        if files.exists(dir .. "/" .. folder .. "/adapter_config.json") then
            for _, dtype in ipairs(T.DTYPES) do
                T.case(("checkpoints/%s %s"):format(folder, dtype), function(c)
                    case(c, T, dir, folder, model_dir, dtype)
                end)
            end
        end
    end
end
