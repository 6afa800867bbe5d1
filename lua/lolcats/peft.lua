-- peft.lua: adapter folders of the PEFT library, in and out: adapter_config.json with adapter_model.safetensors (or
-- .bin). Ranks, alphas, patterns, rslora, biases and whole modules (modules_to_save) are kept; what would be computed
-- in another way than PEFT's is refused by name.
local lc = require "lolcats"
local files = require "lolcats.files"
local lora = require "lolcats.lora"

local M = {}

-- ---- the config -----------------------------------------------------------------------------------------------------
-- Keys that are read, or change nothing about what an adapter computes.
local KNOWN = {}
for key in ([[alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type
    use_rslora loftq_config eva_config corda_config runtime_config lora_ga_config]]):gmatch "%S+" do
    KNOWN[key] = true
end

-- Starts that change the base weights too, so that the adapter alone does not say what the model computes.
local BASE_CHANGING = { pissa = true, olora = true, corda = true, loftq = true, lora_ga = true, milora = true }

local function is_set(v)
    if v == nil or v == files.null or v == false then return false end
    return type(v) ~= "table" or next(v) ~= nil
end

local function is_list(v)
    for _, x in ipairs(v) do
        if type(x) ~= "string" then return false end
    end
    for k in pairs(v) do
        if type(k) ~= "number" then return false end
    end
    return true
end

-- What the keys that are read may hold, where they hold anything.
local KINDS = {
    modules_to_save = { "a list of names", function(v) return type(v) == "table" and is_list(v) end },
    target_modules = { "a list of names or a regular expression",
                       function(v) return type(v) == "string" or type(v) == "table" and is_list(v) end },
    lora_dropout = { "a number from 0 to 1", function(v) return type(v) == "number" and v >= 0 and v < 1 end },
    use_rslora = { "true or false", function(v) return type(v) == "boolean" end },
    rank_pattern = { "an object of numbers", function(v) return type(v) == "table" end },
    alpha_pattern = { "an object of numbers", function(v) return type(v) == "table" end },
    base_model_name_or_path = { "a text", function(v) return type(v) == "string" end },
}

local function check_kinds(c, where)
    for key, kind in pairs(KINDS) do
        if c[key] ~= nil and c[key] ~= files.null and not kind[2](c[key]) then
            lc.fail("%s: '%s' must be %s, it is %s", where, key, kind[1],
                    type(c[key]) == "table" and "something else" or tostring(c[key]))
        end
    end
end

local function check_config(c, where)
    if type(c) ~= "table" then lc.fail("%s: expected a JSON object", where) end
    check_kinds(c, where)
    if c.peft_type ~= "LORA" then
        lc.fail("%s: peft_type '%s' is not supported; LORA is", where, tostring(c.peft_type))
    end
    for key, v in pairs(c) do
        if not KNOWN[key] and is_set(v) then
            lc.fail("%s: %s = %s is not supported", where, key, type(v) == "table" and "{..}" or tostring(v))
        end
    end
    local start = c.init_lora_weights
    if type(start) == "string" and BASE_CHANGING[start:lower():match "^(.-)_niter" or start:lower()] then
        lc.fail("%s: init_lora_weights = '%s' changes the base weights; convert the adapter with PEFT first", where,
                start)
    end
    for _, key in ipairs { "r", "lora_alpha" } do
        if type(c[key]) ~= "number" or not (c[key] > 0 and c[key] < 2 ^ 31) or key == "r" and c[key] % 1 ~= 0 then
            lc.fail("%s: '%s' must be a %snumber above 0, it is %s", where, key, key == "r" and "whole " or "",
                    type(c[key]) == "table" and "a table" or tostring(c[key]))
        end
    end
    for _, key in ipairs { "rank_pattern", "alpha_pattern" } do
        for name, v in pairs(is_set(c[key]) and c[key] or {}) do
            if type(name) ~= "string" or type(v) ~= "number" or v <= 0 then
                lc.fail("%s: %s: '%s' must have a number above 0, it has %s", where, key, tostring(name), tostring(v))
            end
        end
    end
    if c.bias ~= nil and c.bias ~= "none" and c.bias ~= "all" and c.bias ~= "lora_only" then
        lc.fail("%s: bias = '%s' is not one of none, all, lora_only", where, tostring(c.bias))
    end
end

-- ---- reading --------------------------------------------------------------------------------------------------------
local function weights_file(dir)
    for _, name in ipairs { "adapter_model.safetensors", "adapter_model.bin" } do
        if files.exists(dir .. "/" .. name) then return dir .. "/" .. name end
    end
    lc.fail("%s has no adapter_model.safetensors and no adapter_model.bin", dir)
end

--- Is this folder a PEFT adapter?
function M.is_adapter(dir) return files.exists(dir .. "/adapter_config.json") end

--- The base model that an adapter names: its id or folder, or nil.
function M.base_of(dir)
    local c = files.read_json(dir .. "/adapter_config.json")
    local base = type(c) == "table" and c.base_model_name_or_path
    return type(base) == "string" and base ~= "" and base or nil
end

-- Sorts the file's names: adapters[module] = {a = name, b = name}, whole[weight] = name.
local function sort_names(f, where)
    local adapters, whole = {}, {}
    for _, name in ipairs(f:names()) do
        local plain = name:gsub("^base_model%.model%.", "", 1):gsub("%.default", "", 1)
        local module, side = plain:match "^(.+)%.lora_([AB])%.weight$"
        if not module then module, side = plain:match "^(.+)%.lora_embedding_([AB])$" end
        if module then
            adapters[module] = adapters[module] or {}
            adapters[module][side:lower()] = name
        elseif plain:match "lora_magnitude_vector" then
            lc.fail("%s: '%s' belongs to DoRA, which is not supported", where, name)
        elseif plain:match "%.lora_" then
            lc.fail("%s: '%s' is a kind of adapter tensor that is not supported", where, name)
        else
            plain = plain:gsub("%.modules_to_save%.", "."):gsub("%.base_layer%.", "."):gsub("%.original_module%.", ".")
            whole[plain] = name
        end
    end
    return adapters, whole
end

local function shape_text(t) return "[" .. table.concat(t.shape, ", ") .. "]" end

local function read_pair(model, p, f, pair, rank, where)
    local out, inp = lora.sizes(p)
    local got = {}
    for _, side in ipairs { "a", "b" } do
        local name, want = pair[side], side == "a" and { rank, inp } or { out, rank }
        if not name then lc.fail("%s: the adapter of %s has no %s", where, p.name, side:upper()) end
        local x = f:tensor(name, { dtype = model.fine })
        if #x.shape ~= 2 or x.shape[1] ~= want[1] or x.shape[2] ~= want[2] then
            lc.fail("%s: '%s' is %s; model and config make it [%d, %d]", where, name, shape_text(x), want[1], want[2])
        end
        if lc.count_nonfinite(x):item() > 0 then lc.fail("%s: '%s' holds NaN or infinity", where, name) end
        got[side] = x:to { device = model.device }
    end
    return got.a, got.b
end

-- Whole modules and biases: weights of this model's own. Returns the ends of the names of the modules.
local function read_whole(model, c, f, whole, where)
    local names = is_set(c.modules_to_save) and c.modules_to_save or {}
    local biased = c.bias == "all" or c.bias == "lora_only"
    if #names > 0 then lora.train_modules(model, names, c.ensure_weight_tying == true) end
    local known, own = {}, {}
    for _, name in ipairs(model:weight_names()) do known[name] = true end
    for _, name in ipairs(model.trained_weights or {}) do own[name] = true end
    for name, stored in pairs(whole) do
        if not own[name] and biased and name:match "%.bias$" and known[name] then
            lora.train_weight(model, name)
            own[name] = true
        end
        local into = model.weights[name]
        local tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if own[name] then
            local x = f:tensor(stored)
            if shape_text(x) ~= shape_text(into) then
                lc.fail("%s: '%s' is %s; the model's is %s", where, stored, shape_text(x), shape_text(into))
            end
            into:detach():copy_(x)
            own[name] = "read"
        elseif not known[name] and not tied then
            lc.fail("%s: '%s' is no part of this model", where, stored)
        elseif name ~= "model.embed_tokens.weight" and name ~= "lm_head.weight" then
            lc.fail("%s: '%s' is in the file, but the config does not say that it was trained", where, stored)
        else -- PEFT stores the ends beside an adapter on them; they must be the ones this model has
            local x, have = f:tensor(stored), model.weights[name] or model.embed
            if shape_text(x) ~= shape_text(have) then
                lc.fail("%s: '%s' is %s, the model's is %s: the vocabulary was changed, which is not supported", where,
                        stored, shape_text(x), shape_text(have))
            end
        end
    end
    for name, state in pairs(own) do
        if state ~= "read" and not (name == "lm_head.weight" and whole["model.embed_tokens.weight"]) then
            lc.fail("%s: modules_to_save names %s, which is not in the file", where, name)
        end
    end
end

local function dropout_of(c)
    return (c.lora_dropout or 0) > 0 and c.lora_dropout or nil
end

-- What lora.add would need to hang the same adapters on a fresh model; see linearize.lua, which keeps it.
local function record(model, c)
    local out = { rank = c.r, alpha = c.lora_alpha, targets = {}, any_layer = true, rank_pattern = {},
                  alpha_pattern = {}, rslora = c.use_rslora == true or nil, dropout = dropout_of(c),
                  modules_to_save = is_set(c.modules_to_save) and c.modules_to_save or nil,
                  tie_weights = c.ensure_weight_tying == true or nil }
    for _, name in ipairs(model.trained_weights or {}) do
        if name:match "%.bias$" then
            out.weights = out.weights or {}
            table.insert(out.weights, name)
        end
    end
    for _, p in ipairs(lora.places(model)) do
        local l = p.lora
        if l then
            table.insert(out.targets, p.name)
            if l.a:size(1) ~= c.r then out.rank_pattern[p.name] = l.a:size(1) end
            if l.alpha ~= c.lora_alpha then out.alpha_pattern[p.name] = l.alpha end
        end
    end
    return out
end

-- The pairs of a file as {place, a, b, how}, read and checked, and nothing hung up yet.
local function read_pairs(model, c, f, adapters, files_are)
    local by_name, out = {}, {}
    for _, p in ipairs(lora.places(model)) do by_name[p.name] = p end
    for module in pairs(adapters) do
        local p = by_name[module]
        if not p then
            lc.fail("%s: there is an adapter for '%s', which this model does not have", files_are.path, module)
        end
        if p.lora then lc.fail("%s: %s has an adapter already; merge or drop it first", files_are.path, p.name) end
    end
    for _, p in ipairs(lora.places(model)) do
        local pair = adapters[p.name]
        if pair then
            local how = { alpha = lora.by_pattern(c.alpha_pattern, p.name, c.lora_alpha, files_are.config),
                          rslora = c.use_rslora == true, dropout = dropout_of(c) }
            local rank = lora.by_pattern(c.rank_pattern, p.name, c.r, files_are.config)
            local a, b = lc.scope(function() return read_pair(model, p, f, pair, rank, files_are.path) end)
            out[#out + 1] = { p, a, b, how }
        end
    end
    return out
end

-- Reads all of a folder and hangs it on the model.
local function read_all(model, c, f, files_are)
    local adapters, whole = sort_names(f, files_are.path)
    if not next(adapters) and not next(whole) then lc.fail("%s holds no adapter", files_are.path) end
    local list = read_pairs(model, c, f, adapters, files_are)
    lc.no_grad(lc.scope, function() read_whole(model, c, f, whole, files_are.path) end)
    for _, entry in ipairs(list) do lora.attach(unpack(entry)) end
end

--- Hangs the adapters of a PEFT folder on a model; they can be trained further, merged, or saved again. A folder that
--- is refused leaves the model as it was.
function M.load(model, dir)
    local files_are = { config = dir .. "/adapter_config.json" }
    if not files.exists(files_are.config) then
        lc.fail("%s has no adapter_config.json: it is not an adapter folder", dir)
    end
    local c = files.read_json(files_are.config)
    check_config(c, files_are.config)
    for key, v in pairs(c) do
        if v == files.null then c[key] = nil end
    end
    files_are.path = weights_file(dir)
    local f = files.open_tensors(files_are.path)
    local before = { weights = model.weights, config = model.config, trained = model.trained_weights }
    model.trained_weights = before.trained and { unpack(before.trained) }
    local ok, err = pcall(read_all, model, c, f, files_are)
    f:close()
    if not ok then
        model.weights, model.config, model.trained_weights = before.weights, before.config, before.trained
        model:refresh()
        error(err, 0)
    end
    model.lora = record(model, c)
    return model
end

-- ---- writing --------------------------------------------------------------------------------------------------------
-- The short name of a module: q_proj of model.layers.0.self_attn.q_proj.
local function short(name) return name:match "([^.]+)$" end

-- One value for all, by short name where each has one, else by whole name. Returns the commonest and the pattern.
local function pattern_of(list, value)
    local count, best = {}, nil
    for _, p in ipairs(list) do
        local v = value(p)
        count[v] = (count[v] or 0) + 1
        if not best or count[v] > count[best] then best = v end
    end
    local by_short, uniform, out = {}, {}, {}
    for _, p in ipairs(list) do
        local s = short(p.name)
        if by_short[s] == nil then by_short[s], uniform[s] = value(p), true
        elseif by_short[s] ~= value(p) then uniform[s] = false end
    end
    for _, p in ipairs(list) do
        local v, s = value(p), short(p.name)
        if v ~= best then out[uniform[s] and s or p.name] = v end
    end
    return best, out
end

-- target_modules and layers_to_transform (from 0): short names where the layers of each are the same, else whole names.
local function targets_of(model, list)
    local layers, order, names = {}, {}, {}
    for _, p in ipairs(list) do
        local s = short(p.name)
        if not layers[s] then layers[s] = {}; order[#order + 1] = s end
        table.insert(layers[s], p.layer and p.layer - 1 or -1)
        names[#names + 1] = p.name
    end
    local first = table.concat(layers[order[1]], ",")
    for _, s in ipairs(order) do
        if table.concat(layers[s], ",") ~= first then return names end
    end
    if #layers[order[1]] == #model.layers or layers[order[1]][1] == -1 then return order end
    return order, layers[order[1]]
end

-- Biases trained beside the adapters, without those of whole modules: PEFT's word for them, and the names under which
-- it looks for those whose module has an adapter.
local function biases_of(model, list)
    local out, adapted = { mode = "none", names = {} }, {}
    for _, p in ipairs(list) do adapted[p.name] = true end
    local whole = {}
    for _, name in ipairs(model.trained_weights or {}) do
        if name:match "%.weight$" then whole[name:gsub("%.weight$", "")] = true end
    end
    for _, name in ipairs(model.trained_weights or {}) do
        local module = name:match "^(.+)%.bias$"
        if module and not whole[module] then
            if out.mode == "none" then out.mode = "lora_only" end
            if not adapted[module] then out.mode = "all" end
            if adapted[module] then out.names[lora.PREFIX .. name] = lora.PREFIX .. module .. ".base_layer.bias" end
        end
    end
    return out
end

--- Writes a model's adapters (and the modules trained whole beside them) as a PEFT folder.
function M.save(model, dir)
    local list = {}
    for _, p in ipairs(lora.places(model)) do
        if p.lora then list[#list + 1] = p end
    end
    if #list == 0 then lc.fail("this model has no adapters to save") end
    local rslora = list[1].lora.rslora or false
    for _, p in ipairs(list) do
        if (p.lora.rslora or false) ~= rslora then
            lc.fail("some adapters scale by rslora and some do not; a PEFT folder has one way for all")
        end
    end
    local r, ranks = pattern_of(list, function(p) return p.lora.a:size(1) end)
    local alpha, alphas = pattern_of(list, function(p) return p.lora.alpha end)
    local targets, layers = targets_of(model, list)
    local about, tensors = model.lora or {}, {}
    local bias = biases_of(model, list)
    for _, p in ipairs(lora.saved(model)) do tensors[bias.names[p.name] or p.name] = p.tensor:detach() end
    files.make_dirs(dir)
    files.save_tensors(dir .. "/adapter_model.safetensors", tensors, { format = "pt" })
    files.write_json(dir .. "/adapter_config.json", {
        peft_type = "LORA", task_type = "CAUSAL_LM", base_model_name_or_path = model.source or files.null,
        r = r, lora_alpha = alpha, rank_pattern = ranks, alpha_pattern = alphas, target_modules = targets,
        layers_to_transform = layers or files.null, layers_pattern = files.null,
        modules_to_save = about.modules_to_save or files.null, use_rslora = rslora, use_dora = false,
        lora_dropout = about.dropout or 0, bias = bias.mode,
        fan_in_fan_out = false, inference_mode = true, init_lora_weights = true,
    })
    return model
end

return M
