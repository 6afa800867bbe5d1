-- run_name.lua: the reference's names of runs and its paths of checkpoints and results: from the configurations and the
-- flags that were given, by exactly its rules, so that files made there are found here and the other way round. Pure
-- text: reads and writes nothing.
local M = {}

-- ---- words ----------------------------------------------------------------------------------------------------------
--- What a flag is called in a name: the part after the last "/", or the first letters of the parts between "_", or two
--- letters.
function M.abbreviate(name)
    if name:find("/", 1, true) then return name:match "([^/]*)$" end
    if not name:find("_", 1, true) then return name:sub(1, 2) end
    local out = {}
    for part in name:gmatch "[^_]+" do out[#out + 1] = part:sub(1, 1) end
    return table.concat(out)
end

--- A number as Python writes a float: the shortest digits that read back the same.
function M.python_float(v)
    if v ~= v then return "nan" end
    if v == math.huge or v == -math.huge then return v > 0 and "inf" or "-inf" end
    local text
    for digits = 0, 16 do
        text = ("%." .. digits .. "e"):format(v)
        if tonumber(text) == v then break end
    end
    local sign, lead, rest, exponent = text:match "^(-?)(%d)%.?(%d*)e([-+]%d+)$"
    exponent = tonumber(exponent)
    local all = lead .. rest
    if exponent < -4 or exponent >= 16 then
        return ("%s%s%se%s%02d"):format(sign, lead, rest ~= "" and "." .. rest or "", exponent < 0 and "-" or "+",
                                        math.abs(exponent))
    end
    if exponent < 0 then return sign .. "0." .. ("0"):rep(-exponent - 1) .. all end
    if #all <= exponent + 1 then return sign .. all .. ("0"):rep(exponent + 1 - #all) .. ".0" end
    return sign .. all:sub(1, exponent + 1) .. "." .. all:sub(exponent + 2)
end

local FLOATS = { lr = true, weight_decay = true, finetune_lr = true }

local function show(name, v)
    if v == nil then return "None" end
    if type(v) == "boolean" then return v and "True" or "False" end
    if type(v) ~= "number" then return tostring(v) end
    if FLOATS[name] then return M.python_float(v) end
    return ("%.0f"):format(v)
end

local function concise(name) return (name:gsub("True", "1"):gsub("False", "0")) end

local function suffix(name, v, spelled)
    return v ~= nil and ("-%s=%s"):format(spelled or M.abbreviate(name), show(name, v)) or ""
end

--- The short form in which a checkpoint's file name stands for a configuration.
function M.condense(path)
    local out = {}
    for piece in (path:match "([^/]*)$" .. "-"):gmatch "([^-]*)%-" do
        if piece:find(".pt", 1, true) then out[#out + 1] = "_" .. piece:sub(1, -4) end
        local value = piece:match "^[^=]*=([^=]*)"
        local letters, whole = {}, value ~= nil
        for part in ((value or "") .. "_"):gmatch "([^_]*)_" do
            whole = whole and part ~= ""
            letters[#letters + 1] = part:sub(1, 1)
        end
        if whole then out[#out + 1] = table.concat(letters) end
    end
    return table.concat(out)
end

-- ---- names ----------------------------------------------------------------------------------------------------------
local TRAINER = { "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_finetune_steps", "seed" }
local MODEL = { "attention_type", "learned_kernel", "tie_qk_kernels", "train_qk", "state_chunk_len",
                "no_peft_grad_ckpt", "window_size",
                "lk_skip_connection", "lk_zero_init", "lk_normal_init" }
local NOT_SCALED = { window_size = true, lk_normal_init = true }

local function experiment_suffixes(f, finetune)
    local out = {}
    local function add(...) out[#out + 1] = suffix(...) end
    if f.dataset and f.dataset ~= "" then add("dataset", f.dataset, "ds") end
    if not finetune then
        add("lr", f.lr)
        add("weight_decay", f.weight_decay)
    end
    if f.optim and f.optim ~= "" then add("optim", f.optim, "o") end
    if f.scheduler and f.scheduler ~= "" then add("scheduler", f.scheduler, "sc") end
    local data = {}
    for k in pairs(f) do
        if type(k) == "string" and k:find("dataset_", 1, true) then data[#data + 1] = k end
    end
    table.sort(data)
    for _, k in ipairs(data) do add(k, f[k]) end
    add("batch_size", f.batch_size)
    for _, k in ipairs(TRAINER) do add(k, f[k]) end
    add("replicate", f.replicate)
    return table.concat(out)
end

local function model_suffixes(f, scaled)
    local out = {}
    for _, k in ipairs(MODEL) do
        if not (scaled and NOT_SCALED[k]) then out[#out + 1] = suffix(k, f[k]) end
    end
    local path = f.pretrained_model_name_or_path
    if path then out[#out + 1] = "-pmnop=" .. path:match "([^/]*)$" end
    return table.concat(out)
end

--- The name before any suffix. flags: those of the command line, absent where they were not given (seed counts as 0).
--- fsdp: as the scripts for many GPUs write it.
function M.base(flags, fsdp)
    local loaded, tuned = flags.load_distill_checkpoint, flags.load_finetune_checkpoint
    local d = loaded and loaded ~= "default" and M.condense(loaded) or flags.distill_config
    local f = tuned and not flags.finetune_config and M.condense(tuned) or flags.finetune_config
    local out = ("dl-d=%s-m=%s-f=%s"):format(show("", d), show("", flags.model_config), show("", f))
    out = out .. suffix("no_peft_grad_ckpt", flags.no_peft_grad_ckpt)
    if fsdp then
        out = out .. suffix("", flags.fsdp_activation_checkpointing, "fac")
    else
        out = out .. "-s=" .. show("seed", flags.seed or 0)
    end
    if flags.debug then out = out .. "-debug" end
    if flags.no_attention_mask ~= nil and not fsdp then out = out .. "-nam=1" end
    return concise(out)
end

--- Names of both stages. trainer: the first stage's trainer block (flags laid over it) where that stage is trained in
--- this process: the reference lets its settings into the second name. opts.fsdp: the names of the scripts for many
--- GPUs. Returns {distill =, finetune =}.
function M.names(flags, trainer, opts)
    local fsdp = opts and opts.fsdp
    local f = {}
    for k, v in pairs(flags) do f[k] = v end
    f.seed, f.replicate = flags.seed or 0, flags.replicate or 0
    local first = concise(M.base(f, fsdp) .. experiment_suffixes(f) .. model_suffixes(f, fsdp))
    if trainer and not fsdp then
        for _, k in ipairs { "batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
                             "max_finetune_steps" } do
            if trainer[k] ~= nil then f[k] = trainer[k] end
        end
    end
    if f.max_finetune_steps and not fsdp then f.max_steps = f.max_finetune_steps end
    local second = first .. experiment_suffixes(f, not fsdp or nil)
    if fsdp and flags.finetune_lr then second = second .. "=flr=" .. show("finetune_lr", flags.finetune_lr) end
    return { distill = first, finetune = second }
end

-- ---- paths ----------------------------------------------------------------------------------------------------------
local function replace(text, what, by) -- every occurrence, as text
    local out, at = {}, 1
    while what ~= "" do
        local from, to = text:find(what, at, true)
        if not from then break end
        out[#out + 1], at = text:sub(at, from - 1) .. by, to + 1
    end
    return table.concat(out) .. text:sub(at)
end

local function join(a, b) return a:sub(-1) == "/" and a .. b or a .. "/" .. b end

--- Paths of a run: {distill =, finetune =, csv =, evaluation =}; with opts.fsdp folders instead of files.
function M.paths(flags, trainer, opts)
    local names = M.names(flags, trainer, opts)
    local root, results = flags.checkpoint_dir or "./checkpoints", flags.results_dir or "./results"
    local dir = join(root, tostring(flags.model_config))
    if opts and opts.fsdp then
        return { distill = dir .. "/distill-" .. names.distill, finetune = dir .. "/finetune-" .. names.finetune,
                 names = names }
    end
    local out = { distill = ("%s/%s_distill.pt"):format(dir, names.distill),
                  finetune = ("%s/%s_ft.pt"):format(dir, names.finetune),
                  evaluation = ("%s/%s_final.pt"):format(dir, names.finetune), names = names }
    out.csv = replace(replace(out.finetune, ".pt", ".csv"), dir, join(results, tostring(flags.model_config)))
    return out
end

--- The copy of a checkpoint that belongs to an update.
function M.periodic(path, step) return replace(path, ".pt", ("_%d.pt"):format(step)) end

--- The file of a block of layers (first and last, from 0) of a model of n layers; path: CHECKPOINT_DIR/NAME, for the
--- scripts for blocks have no folder of the model's.
function M.block(path, first, last, n)
    local form = "%0" .. #tostring(n) .. "d"
    return (path:gsub("_distill%.pt$", "") .. ("-in=" .. form .. "-out=" .. form .. "_distill.pt"):format(first, last))
end

--- The file, in the working folder, in which the scripts for many GPUs put together what both stages learned. names: of
--- M.names. opts, after blocks: final (the second stage's configuration), no_distill, step (of the checkpoint).
function M.combined(names, opts)
    local run = names.finetune
    if opts and opts.final then
        run = ("%s-ef=%s-ft_lora=0%s%s-s=%d"):format(names.distill, opts.final, opts.no_distill and "-no_distill" or "",
                                                     names.finetune:sub(#names.distill + 1), opts.step)
    end
    for _, folder in ipairs { "llama3_1_405b/", "llama3_1_70b/", "llama3_1_8b/" } do run = replace(run, folder, "") end
    return "ckpt_lora-" .. replace(run, "/", "_") .. ".pt"
end

--- The name of a run of the evaluation harness.
function M.evaluation(task, shots, opts)
    opts = opts or {}
    local out = ("d=%s-ns=%d"):format(task, shots or 0)
    if opts.limit then out = out .. "-li=" .. M.python_float(opts.limit) end
    if opts.checkpoint then out = out .. "-c=" .. opts.checkpoint:match "([^/]*)$" end
    return out .. suffix("", opts.replicate, "r")
end

--- The configurations that a checkpoint's path names: {model =, distill =, finetune =}; a field is nil where the path
--- has none.
function M.parse(path)
    local d = path:match "%-d=(.-)%-m="
    local rest, at = path, nil
    repeat
        local from, to = rest:find("-m=", (at or 0) + 1, true)
        at = to or at
    until not from
    return { model = at and rest:sub(at + 1):match "^(.-)%-f=", distill = d, finetune = path:match "%-f=([^-]*)" }
end

return M
