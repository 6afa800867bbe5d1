-- students.lua: checkpoints of the reference that tests/peers/students.py wrote: loaded in each way there is, their
-- logits are those of its float64 mathematics; and written again for Python to read.
--   lolcats tests/peers/students.lua FOLDER
local lc = require "lolcats"
local files = lc.files
local checkpoint, configs = require "lolcats.reference_checkpoint", require "lolcats.configs"
local folder = arg and arg[1] or ""
local failed, passed = 0, 0

local function compare(name, got, want)
    local d = lc.scope(function() return ((got:to "f64" - want):abs():amax() / want:abs():amax()):item() end)
    if d <= 1e-9 then passed = passed + 1 else
        failed = failed + 1
        print(("FAIL  %s: differs by %.3g"):format(name, d))
    end
end

local function logits(model, ids) return lc.no_grad(function() return model:logits(ids) end) end

local function run(name)
    local dir = folder .. "/" .. name
    local about, t = files.read_json(dir .. "/case.json"), files.open_tensors(dir .. "/expected.safetensors")
    local ids, config_dir, model_dir = t:tensor("ids"):totable(), dir .. "/configs", dir .. "/model_files"
    local function path(i) return dir .. "/" .. about.files[i] end
    local what = name .. " (" .. about.kind .. ")"
    local function base() return lc.load(model_dir, { dtype = "f64" }) end
    compare(what .. " softmax", logits(base(), ids), t:tensor "softmax")

    -- by hand: the configuration, then file by file
    local tree = configs.load("model", about.model, config_dir)
    local student = lc.linearize(base(), configs.linearize_options(tree))
    local last = about.files[#about.files] ~= about.files[1] and #about.files or nil
    checkpoint.load_all(student, path(1))
    student:use_linear()
    compare(what .. " first", logits(student, ids), t:tensor "first")
    student:add_lora { rank = about.r, alpha = about.alpha, targets = about.targets }
    checkpoint.load(student, path(last or 1))
    compare(what .. " second", logits(student, ids), t:tensor "second")

    -- by its name alone
    if checkpoint.is_named(path(last or 1)) then
        local opened = lc.load(path(last or 1), { base = model_dir, dtype = "f64", config_dir = config_dir,
                                                  distill = about.kind == "blocks" and path(1) or nil })
        compare(what .. " by name", logits(opened, ids), t:tensor "second")
    end
    local lora = checkpoint.lora_of(path(last or 1), config_dir)
    if lora.rank ~= about.r then
        failed = failed + 1
        print("FAIL  " .. what .. ": rank " .. lora.rank)
    end

    -- a folder of ours keeps it; both ways of writing .pt
    student:save(dir .. "/student")
    compare(what .. " saved", logits(lc.load(dir .. "/student", { base = base() }), ids), t:tensor "second")
    for _, p in ipairs(student:map_params()) do p.tensor:requires_grad_(true) end
    checkpoint.save(student, dir .. "/recipe_distill.pt", { step = 10, ["distill/eval/loss"] = 1 }, "pt", "maps")
    for _, p in ipairs(student:map_params()) do p.tensor:requires_grad_(false) end
    checkpoint.save(student, dir .. "/recipe_ft.pt", { step = 10, ["eval/loss"] = 1 }, "pt", "trained")
    checkpoint.export(dir .. "/student", dir .. "/export")
    t:close()
end

for _, name in ipairs(files.list(folder)) do
    if files.exists(folder .. "/" .. name .. "/case.json") then
        local ok, problem = pcall(lc.scope, run, name)
        if not ok then
            failed = failed + 1
            local about = files.read(folder .. "/" .. name .. "/case.json"):sub(1, 300)
            print(("FAIL  %s %s: %s"):format(name, about, tostring(problem)))
        end
    end
end
print(("%d comparisons passed, %d failed"):format(passed, failed))
os.exit(failed == 0 and passed > 0 and 0 or 1)
