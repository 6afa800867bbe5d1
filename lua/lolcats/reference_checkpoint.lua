-- reference_checkpoint.lua: what a run trained, as the reference's .pt files have it (torch.save of a dict with
-- model_state_dict, step and the metric), or as a folder of our own. Reads the reference's three spellings of names,
-- and builds a student from a checkpoint whose name says how it was made.
local lc = require "lolcats"
local files = require "lolcats.files"
local lora = require "lolcats.lora"
local log = require "lolcats.log"

local M = {}

local LONGEST = 250 -- bytes of a name: most file systems take 255, and files are written beside their name first

--- A path whose names a file system takes: a longer one keeps its head and tail around a digest of the whole.
function M.fits(path)
    return (path:gsub("[^/]+", function(name)
        if #name <= LONGEST then return nil end
        local tail = name:match "[^-]*$"
        if #tail > 60 then tail = tail:sub(-60) end
        log.say("the name %s... has %d bytes, more than a file system takes; it is shortened", name:sub(1, 40), #name)
        return name:sub(1, LONGEST - #tail - 12) .. "-" .. files.sha256(name):sub(1, 10) .. "-" .. tail
    end))
end

-- One name for all spellings: "layers.0.self_attn.q_proj.lora_A.weight". first: the number of a block file's layer 0.
local function canonical(name, first)
    if first then name = name:gsub("layers%.(%d+)%.", function(n) return ("layers.%d."):format(n + first) end, 1) end
    return (name:gsub("^.-(layers%.%d+%.)", "%1"):gsub("%.lora_([AB])%.default%.weight$", ".lora_%1.weight"))
end

local function trained(student)
    local out = student.map_params and student:map_params() or {}
    for _, p in ipairs(lora.parameters(student)) do out[#out + 1] = p end
    return out
end

local function shape(x) return table.concat(x.shape, ", ") end

--- The file that a checkpoint's name stands for: a path (.pt, .safetensors, a distributed checkpoint, a folder of
--- ours), or a repository of a Hub with one file of weights, or owner/name/file in one.
function M.find(path)
    for _, place in ipairs { path, (path:gsub("%.pt$", "")) } do
        if files.exists(place .. "/student.safetensors") then return place .. "/student.safetensors" end
        if files.exists(place) then return place end
    end
    local owner, _, rest = path:match "^([%w][%w%-%._]*)/([%w][%w%-%._]*)(.*)$"
    if not owner or files.exists(owner) or rest == "" and path:match "%.pt$" then
        lc.fail("there is no checkpoint %s", path)
    end
    local hub = require "lolcats.hub"
    if rest ~= "" then return hub.resolve(path) end
    return hub.files(path, function(names)
        local found = {}
        for _, name in ipairs(names) do
            if name:match "^[^/]+%.pt$" or name:match "^[^/]+%.safetensors$" then found[#found + 1] = name end
        end
        if #found ~= 1 then
            lc.fail("%s holds %d checkpoints; name one, as in %s/FILE: %s", path, #found, path,
                    table.concat(found, ", "))
        end
        return found
    end)[1]
end

--- Copies a checkpoint (see M.find) into a student's maps, window factors and adapters. Returns how many tensors were
--- taken. A tensor that is in neither, or has another shape, is an error; parameters that the file does not have stay.
function M.load(student, path)
    path = M.find(path)
    local f = files.open_tensors(path)
    local mine, taken, left = {}, 0, 0
    local first = files.basename(path):match "%-in=(%d+)%-out=" -- a block's file: its layers count from 0
    for _, p in ipairs(trained(student)) do mine[canonical(p.name)] = p.tensor end
    lc.no_grad(lc.scope, function()
        for _, name in ipairs(f:names()) do
            local key = canonical(name, first)
            local p = mine[key]
            if p then
                local x = f:tensor(name)
                if shape(x) ~= shape(p) then
                    lc.fail("%s: '%s' is [%s], the student's is [%s]: other configurations made it", path, name,
                            shape(x), shape(p))
                end
                p:detach():copy_(x)
                taken = taken + 1
            elseif key:match "%.lora_[AB]%.weight$" and not student.lora then
                left = left + 1 -- adapters, before there are any
            elseif not key:match "window_factor$" then -- the reference's second name of window_factors
                lc.fail("%s: '%s' has no place in this student: other configurations made it", path, name)
            end
        end
    end)
    f:close()
    if taken == 0 and left == 0 then lc.fail("%s holds nothing of this student", path) end
    log.say("%s: %d tensors loaded%s", path, taken, left > 0 and (", %d of adapters not yet"):format(left) or "")
    return taken
end

--- The files of a block-wise first stage (...-in=000-out=008_distill.pt) that belong together with one of them, in
--- order; any other path alone.
function M.files_of(path)
    local head, tail = path:match "^(.*%-in=)%d+%-out=%d+(_distill[_%d]*%.pt)$"
    if not head then return { path } end
    local out, dir, stem = {}, files.dirname(path), files.basename(head)
    for _, name in ipairs(files.is_folder(dir) and files.list(dir) or {}) do
        if name:sub(1, #stem) == stem and name:sub(#stem + 1):match "^%d+%-out=%d+(.*)$" == tail then
            out[#out + 1] = dir .. "/" .. name
        end
    end
    table.sort(out)
    return #out > 0 and out or { path }
end

--- Loads a checkpoint as M.load does; where it is a block's, those of all blocks.
function M.load_all(student, path)
    local taken = 0
    for _, file in ipairs(M.files_of(path)) do taken = taken + M.load(student, file) end
    return taken
end

--- Sorts a list of adapter tensors as modules stand in the reference: a projection's A, then its B.
function M.in_order(list)
    local place = {}
    for _, e in ipairs(list) do
        local module = e.name:gsub("%.lora_[AB].*$", "")
        place[module] = place[module] or e.at
        e.module = place[module]
    end
    table.sort(list, function(a, b)
        if a.module ~= b.module then return a.module < b.module end
        return a.name < b.name
    end)
    return list
end

--- Writes what was trained. values: step and the metric. format: "pt", or "folder" (student:save). what: "maps" (maps
--- and window factors that were trained), or "trained" (adapters and whatever else is trained now). block ({first =,
--- last =}, layers from 1): only the maps of these layers, which then count from 0, as in a block's file.
function M.save(student, path, values, format, what, block)
    path = M.fits(path)
    files.make_dirs(files.dirname(path))
    if format ~= "pt" or not path:match "%.pt$" then -- the scripts for many GPUs name folders
        student:save((path:gsub("%.pt$", "")))
        return
    end
    local list = {}
    if what == "maps" then
        for _, p in ipairs(student:map_params()) do
            local at = block and tonumber(p.name:match "layers%.(%d+)%.") + 1
            if p.tensor.requires_grad and (not block or at >= block.first and at <= block.last) then
                local name = block and p.name:gsub("layers%.%d+%.", ("layers.%d."):format(at - block.first)) or p.name
                list[#list + 1] = { name = name, tensor = p.tensor:detach() }
            end
        end
    else
        for _, p in ipairs(trained(student)) do
            if p.tensor.requires_grad then
                local name = p.name:gsub("^base_model%.model%.", ""):gsub("%.lora_([AB])%.weight$",
                        ".lora_%1.default.weight")
                list[#list + 1] = { name = "base_model.model." .. name, tensor = p.tensor:detach(), at = #list }
            end
        end
        M.in_order(list)
    end
    local plain = {}
    for k, v in pairs(values) do plain[k] = k == "step" and v or { real = v } end
    files.save_tensors(path, list, nil, { values = plain, wrap = "model_state_dict" })
end

-- ---- a student from a name ------------------------------------------------------------------------------------------
-- What a name's suffixes say: flag and how its value reads.
local function yes(v) return v == "1" end
local SUFFIXES = { at = { "attention_type" }, lk = { "learned_kernel" }, tqk = { "tie_qk_kernels", yes },
                   scl = { "state_chunk_len", tonumber },
                   ws = { "window_size", tonumber }, lsc = { "lk_skip_connection", yes }, lzi = { "lk_zero_init", yes },
                   lni = { "lk_normal_init", yes } }

local function flags_of(path)
    local out = {}
    for key, value in (path:match "%-f=.*$" or ""):gsub("_[%a_%d]*%.pt$", ""):gmatch "%-(%a+)=([^-]*)" do
        local row = SUFFIXES[key]
        if row then out[row[1]] = row[2] and row[2](value) or not row[2] and value or nil end
    end
    return out
end

--- Is this the path of a checkpoint named as the reference names them?
function M.is_named(path) return type(path) == "string" and path:match "dl%-d=.*%-m=.*%-f=.*%.pt$" ~= nil end

-- The first stage's file that belongs to a second stage's: its name is the longest with which the other begins.
local function first_stage(path)
    local folder, stem, best = files.dirname(path), files.basename(path):gsub("_ft[_%d]*%.pt$", ""), nil
    for _, name in ipairs(files.is_folder(folder) and files.list(folder) or {}) do
        local head = name:match "^(.*)_distill%.pt$"
        if head and stem:sub(1, #head) == head and (not best or #head > #best) then best = head end
    end
    return best and folder .. "/" .. best .. "_distill.pt"
end

--- The options of student:add_lora for a checkpoint: rank and projections as its tensors have them, alpha from the
--- configuration that its name names, where that has this rank; else twice the rank, as in every one of the
--- reference's. nil where it holds no adapters.
function M.lora_of(path, dir)
    local configs, f = require "lolcats.configs", files.open_tensors(M.find(path))
    local targets, seen, rank = {}, {}, nil
    for _, name in ipairs(f:names()) do
        local target = name:match "%.([%w_]+)%.lora_A%."
        if target then rank = f:info(name).shape[1] end
        if target and not seen[target] then seen[target], targets[#targets + 1] = true, target end
    end
    f:close()
    if not rank then return nil end
    for _, pattern in ipairs { "%-ef=([^-]*)", "%-f=([^-]*)" } do
        local name = files.basename(path):match(pattern) or path:match(pattern)
        local full = name and configs.full_name("experiment", name, dir)
        local lora = full and configs.lora_options(configs.load("experiment", full, dir))
        if lora and lora.rank == rank then return { rank = rank, alpha = lora.alpha, targets = targets } end
    end
    log.say("%s: LoRA of rank %d and alpha %d, as its tensors and the reference's habit say", path, rank, 2 * rank)
    return { rank = rank, alpha = 2 * rank, targets = targets }
end

-- Does a checkpoint hold feature maps or window factors?
local function has_maps(path)
    local f, found = files.open_tensors(path), false
    for _, name in ipairs(f:names()) do found = found or name:match "feature_map_" or name:match "window_factors$" end
    f:close()
    return found
end

--- The student that a named checkpoint stands for, with both stages where it is of the second. opts: base (a model, or
--- its name; else the configuration's), distill (the first stage's file, where it is not beside it), config_dir, dtype,
--- device, compat.
function M.open(path, opts)
    opts = opts or {}
    local configs, about = require "lolcats.configs", require("lolcats.run_name").parse(path)
    if not M.is_named(path) then
        lc.fail("the name of %s does not say how it was made (dl-d=...-m=...-f=....pt)", path)
    end
    local dir = opts.config_dir or "configs"
    local name = configs.full_name("model", about.model, dir) or about.model
    local tree = configs.override_model(configs.load("model", name, dir), flags_of(path))
    local options = configs.linearize_options(tree) or lc.fail("%s: its attention is softmax; it is no student", path)
    options.compat = opts.compat
    local base = opts.base or tree.model.pretrained_model_name_or_path
    if type(base) == "string" then
        base = require("lolcats.models").load(base, { dtype = opts.dtype, device = opts.device })
    end
    local student, first_lora = lc.linearize(base, options), configs.first_lora_options(tree)
    local function load_first(file)
        if first_lora then student:add_lora(first_lora) end
        M.load_all(student, file)
        if first_lora then student:merge_first_lora() end
    end
    if path:match "_distill[_%d]*%.pt$" then
        load_first(path)
        return student:use_linear()
    end
    local first = opts.distill or first_stage(path)
    if first then load_first(first) elseif not has_maps(path) then
        log.say("%s: no file of the first stage beside it", path)
    end
    student:use_linear():add_lora(M.lora_of(path, dir) or lc.fail("%s holds no adapters", path))
    M.load(student, path)
    return student
end

--- Writes all that both stages learned into one file, as the scripts for many GPUs do: a plain dict with PEFT's names.
function M.save_combined(student, path)
    local list = {}
    local function put(name, tensor)
        list[#list + 1] = { name = "base_model.model." .. name, tensor = tensor:detach(), at = #list }
    end
    for _, p in ipairs(student:map_params()) do put(p.name, p.tensor) end
    local adapters, maps = {}, list
    list = adapters
    for _, p in ipairs(lora.parameters(student)) do
        put(p.name:gsub("^base_model%.model%.", ""):gsub("%.lora_([AB])%.weight$", ".lora_%1.default.weight"), p.tensor)
    end
    for _, e in ipairs(M.in_order(adapters)) do maps[#maps + 1] = e end
    files.save_tensors(M.fits(path), maps)
end

--- Writes a saved student's folder as the reference's .pt files: STEM_distill.pt with maps and window factors, and
--- STEM_ft.pt with adapters, where it has some. Returns their paths.
function M.export(dir, stem)
    local f, maps, loras = files.open_tensors(dir .. "/student.safetensors"), {}, {}
    for at, name in ipairs(f:names()) do
        if name:match "%.lora_[AB]" then
            local full = name:gsub("^base_model%.model%.", ""):gsub("%.lora_([AB])%.weight$", ".lora_%1.default.weight")
            loras[#loras + 1] = { name = "base_model.model." .. full, tensor = f:tensor(name), at = at }
        else
            maps[#maps + 1] = { name = name, tensor = f:tensor(name) }
        end
    end
    f:close()
    local out = {}
    local function write(list, ending, metric)
        if #list == 0 then return end
        out[#out + 1] = stem .. ending
        files.save_tensors(stem .. ending, list, nil,
                           { values = { step = 0, [metric] = { real = 0 } }, wrap = "model_state_dict" })
    end
    write(maps, "_distill.pt", "distill/eval/loss")
    write(M.in_order(loras), "_ft.pt", "eval/loss")
    return out
end

return M
