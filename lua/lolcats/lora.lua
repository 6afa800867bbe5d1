-- lora.lua: low-rank adapters on a model's projections, with PEFT's arithmetic and names: y = W x + (alpha / r) B (A
-- x), or alpha / sqrt(r) with rslora; whole modules trained beside them (modules_to_save); merging.
local lc = require "lolcats"

local M = {}

local PREFIX = "base_model.model."
local DEFAULT_TARGETS = { "q_proj", "k_proj", "v_proj", "o_proj" }

-- ---- which modules --------------------------------------------------------------------------------------------------
--- Every module that can carry an adapter, in checkpoint order: the projections, then the embedding and the head.
function M.places(model)
    local out = model:projections()
    out[#out + 1], out[#out + 2] = model.embed_proj, model.head_proj
    return out
end

local function ends_with(name, tail) return name == tail or name:sub(-#tail - 1) == "." .. tail end

-- Does a regular expression of PEFT's match the whole of a module's name? Plain names need no engine.
local function matches(pattern, name)
    return require("lolcats.text").regex_match(pattern, name)
end

--- Does PEFT's target_modules (a list of names or their ends, a regular expression, or "all-linear") mean this module?
function M.is_target(targets, name)
    if type(targets) == "string" then
        if targets:lower() == "all-linear" then return name:match "_proj$" ~= nil end
        return matches(targets, name)
    end
    for _, target in ipairs(targets) do
        if ends_with(name, target) then return true end
    end
    return false
end

--- What a rank_pattern or alpha_pattern gives for a module, else the default. where: for errors.
function M.by_pattern(pattern, name, default, where)
    local found, key_found
    for key, value in pairs(pattern or {}) do
        local hit
        if key:match "^[%w_.]+$" then hit = ends_with(name, key) else hit = matches("(.*\\.)?(" .. key .. ")", name) end
        if hit then
            if found and found ~= value then
                lc.fail("%s: '%s' and '%s' both match %s and give it %s and %s", where, key_found, key, name,
                        tostring(found), tostring(value))
            end
            found, key_found = value, key
        end
    end
    return found or default
end

local function layer_set(model, list)
    local n, set = #model.layers, {}
    if not list then
        for i = 1, n do set[i] = true end
        return set
    end
    for _, i in ipairs(list) do
        local at = i < 0 and n + 1 + i or i
        if at < 1 or at > n then lc.fail("LoRA layers: there is no layer %d; the model has 1 to %d", i, n) end
        set[at] = true
    end
    return set
end

-- ---- adding ---------------------------------------------------------------------------------------------------------
local function check_rank(rank)
    if type(rank) ~= "number" or rank < 1 or rank ~= math.floor(rank) then
        lc.fail("LoRA rank must be a whole number of at least 1, got %s", tostring(rank))
    end
end

--- Hangs an adapter on a module. a [rank, in] and b [out, rank]; of the embedding a is [rank, vocabulary]. how: alpha,
--- rslora, dropout.
function M.attach(p, a, b, how)
    local rank = a:size(1)
    p.lora = { a = lc.param(a), b = lc.param(b), alpha = how.alpha, rslora = how.rslora or nil, on = true,
               scale = how.alpha / (how.rslora and math.sqrt(rank) or rank), dropout = how.dropout }
    for _, side in ipairs { "a", "b" } do p.lora[side]:set_name(M.tensor_name(p, side)) end
end

--- The name of an adapter's tensor in PEFT's files.
function M.tensor_name(p, side)
    if p.is_embedding then return PREFIX .. p.name .. ".lora_embedding_" .. side:upper() end
    return PREFIX .. p.name .. ".lora_" .. side:upper() .. ".weight"
end

-- Rows and columns of the product that an adapter adds: [out, in].
function M.sizes(p)
    local w = p.weight
    if p.is_embedding then return w:size(2), w:size(1) end
    return w:size(1), w:size(2)
end

local function fresh(model, p, rank, how)
    if p.lora then lc.fail("%s has an adapter already; merge it first", p.name) end
    local out, inp = M.sizes(p)
    local where = { dtype = model.fine, device = model.device }
    if p.is_embedding then
        return M.attach(p, lc.zeros({ rank, inp }, where), lc.empty({ out, rank }, where):normal_(0, 1), how)
    end
    local bound = 1 / math.sqrt(inp)
    M.attach(p, lc.empty({ rank, inp }, where):uniform_(-bound, bound), lc.zeros({ out, rank }, where), how)
end

local function refuse_unknown_targets(targets, hits)
    for _, target in ipairs(type(targets) == "table" and targets or {}) do
        if not hits[target] then
            lc.fail("LoRA target '%s' names no projection; there are q_proj, k_proj, v_proj, o_proj, gate_proj, " ..
                    "up_proj, down_proj, embed_tokens, lm_head", tostring(target))
        end
    end
    if type(targets) == "string" and not next(hits) then
        lc.fail("LoRA targets '%s' match no projection", targets)
    end
end

-- Is this module wanted? Layers that keep their softmax attention are not part of what is being linearized.
local function is_wanted(model, p, targets, set, opts)
    if not M.is_target(targets, p.name) then return false end
    local layer = p.layer and model.layers[p.layer]
    if not layer then return not opts.layers end
    return set[p.layer] and (opts.layers or opts.any_layer or not model.is_student or layer.student ~= nil)
end

--- Adds adapters to the modules that `targets` means. A is U(-1/sqrt(in), 1/sqrt(in)), B is 0. opts: rank (8), alpha
--- (16), targets (names or ends of names, a regular expression, or "all-linear"), layers (positions from 1; all but
--- kept softmax layers), rank_pattern, alpha_pattern (of names or regular expressions), rslora, dropout (of the adapter's
--- input while gradients are recorded), modules_to_save (ends of names of modules to train whole), weights (names of
--- single weights to train, such as biases).
function M.add(model, opts)
    opts = opts or {}
    local rank, alpha = opts.rank or opts.r or 8, opts.alpha or 16
    local targets = opts.targets or DEFAULT_TARGETS
    check_rank(rank)
    local set, hits = layer_set(model, opts.layers), {}
    for _, p in ipairs(M.places(model)) do
        if M.is_target(targets, p.name) then
            for _, target in ipairs(type(targets) == "table" and targets or { targets }) do
                if type(targets) == "string" or ends_with(p.name, target) then hits[target] = true end
            end
        end
        if is_wanted(model, p, targets, set, opts) then
            local r = M.by_pattern(opts.rank_pattern, p.name, rank, "rank_pattern")
            check_rank(r)
            fresh(model, p, r, { alpha = M.by_pattern(opts.alpha_pattern, p.name, alpha, "alpha_pattern"),
                                 rslora = opts.rslora, dropout = opts.dropout })
        end
    end
    refuse_unknown_targets(targets, hits)
    if opts.modules_to_save then M.train_modules(model, opts.modules_to_save, opts.tie_weights) end
    for _, name in ipairs(opts.weights or {}) do M.train_weight(model, name) end
    model.lora = { rank = rank, alpha = alpha, targets = targets, layers = opts.layers,
                   rank_pattern = opts.rank_pattern, alpha_pattern = opts.alpha_pattern, rslora = opts.rslora, dropout = opts.dropout,
                   modules_to_save = opts.modules_to_save, any_layer = opts.any_layer, tie_weights = opts.tie_weights,
                   weights = opts.weights }
    return model
end

--- Gives the model a copy of its own of one weight, to be trained.
function M.train_weight(model, name)
    model.trained_weights = model.trained_weights or {}
    for _, have in ipairs(model.trained_weights) do
        if have == name then return end
    end
    if not model.weights[name] then lc.fail("there is no weight '%s' to train", tostring(name)) end
    model:own_weight(name):requires_grad_(true)
    table.insert(model.trained_weights, name)
end

--- Gives the model copies of its own of all weights of modules whose name ends in one of `names`, to be trained whole.
--- A tied head parts from the embedding, as in PEFT, unless tied says that both are to stay one.
function M.train_modules(model, names, tied)
    local c, wanted = model.config, {}
    local heads = false
    for _, p in ipairs(model:weight_names()) do
        local module = p:gsub("%.weight$", ""):gsub("%.bias$", "")
        for _, tail in ipairs(names) do
            if module:sub(-#tail) == tail then -- as PEFT: "norm" is every norm
                wanted[p], wanted[tail] = true, true
                heads = heads or module == "model.embed_tokens"
            end
        end
    end
    if c.tie_word_embeddings then
        for _, tail in ipairs(names) do
            if ("lm_head"):sub(-#tail) == tail then wanted["lm_head.weight"], wanted[tail], heads = true, true, true end
        end
        if heads and tied then
            wanted["lm_head.weight"], wanted["model.embed_tokens.weight"] = nil, true
        elseif heads then
            model:untie()
        end
    end
    for _, tail in ipairs(names) do
        if not wanted[tail] then lc.fail("modules_to_save: '%s' names no module of this model", tostring(tail)) end
    end
    for _, name in ipairs(model:weight_names()) do
        if wanted[name] then M.train_weight(model, name) end
    end
end

-- ---- what is there --------------------------------------------------------------------------------------------------
--- Every adapter tensor as {name=, tensor=}, in layer order; in a layer all A's stand before the B's, so that in a flat
--- buffer the gradients of A's that share their input are one matrix.
function M.parameters(model)
    local out, names = {}, require("lolcats.models.llama").PROJECTIONS
    local function add(p, side)
        if p.lora then out[#out + 1] = { name = M.tensor_name(p, side), tensor = p.lora[side] } end
    end
    for _, layer in ipairs(model.layers) do
        for _, side in ipairs { "a", "b" } do
            for _, name in ipairs(names) do add(layer.proj[name], side) end
        end
    end
    for _, p in ipairs { model.embed_proj, model.head_proj } do add(p, "a"); add(p, "b") end
    return out
end

--- What an adapter's file holds: its tensors, and the modules that are trained whole, under PEFT's names.
function M.saved(model)
    local out = M.parameters(model)
    for _, name in ipairs(model.trained_weights or {}) do
        out[#out + 1] = { name = PREFIX .. name, tensor = model.weights[name] }
    end
    return out
end

-- ---- merging --------------------------------------------------------------------------------------------------------
local function apply(model, sign)
    lc.no_grad(function()
        for _, p in ipairs(M.places(model)) do
            local l = p.lora
            if l and l.on == (sign > 0) then
                lc.scope(function()
                    local delta = l.b:detach():matmul(l.a:detach())
                    if p.is_embedding then delta = delta:transpose(1, 2):contiguous() end
                    if p.weight.dtype == delta.dtype then
                        p.weight:add_(delta, sign * l.scale)
                    else -- rounded once
                        p.weight:copy_(p.weight:to(delta.dtype) + delta * (sign * l.scale))
                    end
                end)
                l.on = sign < 0
            end
        end
    end)
end

--- Adds the adapters into this model's own copy of the weights (another model may share them) and turns them off.
function M.merge(model)
    model:own_weights()
    if model.embed_proj.lora or model.head_proj.lora then
        model:untie()
        for _, p in ipairs { model.embed_proj, model.head_proj } do
            if p.lora then model:own_weight(p.name .. ".weight") end
        end
    end
    apply(model, 1)
    return model
end

--- Takes merged adapters out again, up to rounding.
function M.unmerge(model)
    apply(model, -1)
    return model
end

--- Forgets the adapters; merged ones, and modules that were trained whole, stay in the weights.
function M.drop(model)
    for _, p in ipairs(M.places(model)) do p.lora = nil end
    for _, name in ipairs(model.trained_weights or {}) do model.weights[name]:requires_grad_(false) end
    model.lora, model.trained_weights = nil, nil
    return model
end

M.PREFIX = PREFIX
return M
