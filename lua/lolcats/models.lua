-- models.lua: lc.load: a model with its tokenizer and chat template from a folder, a file, a Hub id in the local
-- cache, or `smollm2`. Reads config.json + safetensors (one file or shards) and GGUF; a folder saved by student:save
-- too.
local lc = require "lolcats"
local files = require "lolcats.files"
local hub = require "lolcats.hub"
local config = require "lolcats.models.config"
local rope = require "lolcats.models.rope"
local weights = require "lolcats.models.weights"
local llama = require "lolcats.models.llama"

local M = {}

local DTYPES = { f32 = "f32", float32 = "f32", bf16 = "bf16", bfloat16 = "bf16", f16 = "f16", float16 = "f16",
                 f64 = "f64", float64 = "f64" }

local function read_opts(opts)
    local dtype = DTYPES[opts.dtype or "f32"]
    if not dtype then
        lc.fail("dtype '%s' is not one that a model can be loaded in: f32, bf16, f16, f64", tostring(opts.dtype))
    end
    local device = opts.device or lc.default_device()
    if not device:match ":" and device ~= "cpu" then device = device .. ":0" end
    -- what is trained stays in f32; on a CPU activations and norms do too, since it computes in f32
    local compute = opts.compute and DTYPES[opts.compute] or (dtype == "f64" or device ~= "cpu") and dtype or "f32"
    if opts.compute and (not DTYPES[opts.compute] or (compute == "f64") ~= (dtype == "f64")) then
        lc.fail("compute = '%s' does not go with weights in %s", tostring(opts.compute), dtype)
    end
    return { dtype = dtype, compute = compute, device = device, check = opts.check, part = opts.part }
end

-- A string or {content = ...}, as tokenizer_config.json has them.
local function token_text(v)
    if type(v) == "table" and v ~= files.null then v = v.content end
    if type(v) == "string" then return v end
end

local function optional_json(path)
    if files.exists(path) then return files.read_json(path) end
end

-- Template text: tokenizer_config.json's, or chat_template.jinja beside it. Several named ones: the default.
local function read_template(dir, tc)
    local t = tc and tc.chat_template
    if type(t) == "table" and t ~= files.null then
        for _, entry in ipairs(t) do
            if entry.name == "default" then t = entry.template end
        end
    end
    if type(t) == "string" then return t end
    if files.exists(dir .. "/chat_template.jinja") then return files.read(dir .. "/chat_template.jinja") end
end

local function ids_of(v)
    if v == nil or v == files.null then return {} end
    if type(v) == "number" then return { v } end
    local out = {}
    for _, id in ipairs(v) do out[#out + 1] = id end
    return out
end

local function add_ids(set, list)
    for _, id in ipairs(list) do set[id] = true end
end

-- The config of some layers of a model: part = {first =, last = (positions of layers), embed =, head = (booleans)}. Its
-- layers keep their names.
local function cut(c, part)
    if not part then return c end
    local n, out = c.num_hidden_layers, {}
    local first, last = part.first or 1, part.last or n
    if first < 1 or last > n or first > last + 1 then
        lc.fail("part: layers %s to %s of a model that has 1 to %d", tostring(first), tostring(last), n)
    end
    for k, v in pairs(c) do out[k] = v end
    out.num_hidden_layers = last - first + 1
    out.part = { first = first, last = last, embed = part.embed, head = part.head, of = n }
    if c.windows then
        out.windows = {}
        for i = first, last do out.windows[i - first + 1] = c.windows[i] end
    end
    return out
end

-- A part without any weights is asked for because of what stands beside them.
local function tokenizer_alone(part, c) return c.num_hidden_layers == 0 and not (part.embed or part.head) end

-- ---- a Hugging Face folder ------------------------------------------------------------------------------------------
local function load_folder(dir, opts)
    if not files.exists(dir .. "/config.json") then
        local gguf
        for _, name in ipairs(files.list(dir)) do
            if name:match "%.gguf$" then
                if gguf then lc.fail("%s holds several GGUF files; name the one to load", dir) end
                gguf = dir .. "/" .. name
            end
        end
        if gguf then return M.load_gguf(gguf, opts) end
        lc.fail("%s has no config.json (and no GGUF file): it is not a model folder", dir)
    end
    local c = config.normalize(files.read_json(dir .. "/config.json"), dir .. "/config.json")
    c = cut(c, opts.part)
    local file = files.open_tensors(opts.weights or dir)
    local w = weights.load({ file = file, format = "safetensors", path = opts.weights or dir }, c, opts)
    file:close()
    local model_opts = { dtype = opts.compute, device = opts.device, source = opts.source or dir, special = {} }
    if opts.part and not tokenizer_alone(opts.part, c) then return llama.new(c, w, model_opts) end
    if lc.text.find_tokenizer(dir) then model_opts.tokenizer = lc.tokenizer(dir) end
    local tc = optional_json(dir .. "/tokenizer_config.json")
    local gc = optional_json(dir .. "/generation_config.json")
    model_opts.chat_template = read_template(dir, tc)
    local special, tok = model_opts.special, model_opts.tokenizer
    special.bos_token, special.eos_token = tc and token_text(tc.bos_token), tc and token_text(tc.eos_token)
    special.stop = {}
    add_ids(special.stop, ids_of(c.eos_token_id))
    if gc then add_ids(special.stop, ids_of(gc.eos_token_id)) end
    if tok and special.eos_token then
        local id = tok:id(special.eos_token)
        if id then special.stop[id] = true end
    end
    return llama.new(c, w, model_opts)
end

-- ---- GGUF -----------------------------------------------------------------------------------------------------------
function M.load_gguf(path, opts)
    local file = files.open_tensors(path)
    local function meta(key) return file:meta(key) end
    local c = config.from_gguf(meta, function(name) return file:has(name) end,
                               function(name) return file:has(name) and file:info(name).shape or nil end, path)
    if file:has "rope_freqs.weight" then
        local factors = lc.scope(function() return file:tensor("rope_freqs.weight", { dtype = "f32" }):totable() end)
        c.rope_scaling = rope.from_factors(c, factors)
    end
    c = cut(c, opts.part)
    local w = weights.load({ file = file, format = "gguf", path = path }, c, opts)
    if opts.part and not tokenizer_alone(opts.part, c) then
        file:close()
        return llama.new(c, w, { dtype = opts.compute, device = opts.device, source = opts.source or path, special = {} })
    end
    local tokenizer = meta "tokenizer.ggml.model" and lc.tokenizer(file) or nil
    local special = { stop = {} }
    add_ids(special.stop, ids_of(c.eos_token_id))
    if tokenizer then
        special.bos_token = c.bos_token_id and tokenizer:token(c.bos_token_id)
        special.eos_token = c.eos_token_id and tokenizer:token(c.eos_token_id)
        add_ids(special.stop, ids_of(meta "tokenizer.ggml.eot_token_id"))
    end
    local model = llama.new(c, w, { dtype = opts.compute, device = opts.device, source = opts.source or path,
                                    special = special, tokenizer = tokenizer,
                                    chat_template = meta "tokenizer.chat_template" })
    file:close()
    return model
end

-- A PEFT folder: its base (opts.base, or what the folder names) with the adapter on it.
local function load_adapter(dir, opts)
    local peft = require "lolcats.peft"
    local base = opts.base or peft.base_of(dir)
    if not base then lc.fail("%s is an adapter and does not name its base model; give it as base =", dir) end
    if type(base) == "string" then base = M.load(base, { dtype = opts.dtype, device = opts.device, compute = opts.compute }) end
    return peft.load(base, dir)
end

--- Loads a model. name: a folder, a GGUF or safetensors file, a Hub id in the local cache, "smollm2", or "random:SHAPE"
--- (random weights of a known shape: see models/shapes.lua). opts: dtype of the weight matrices ("f32", "bf16", "f16",
--- "f64"), device, compute (dtype of activations: f32 on the CPU, as the weights elsewhere), revision, check = false (do
--- not look for NaN), part (some layers only: {first =, last =, embed =, head =}); for a saved student also base, map,
--- trust_code.
function M.load(name, opts)
    opts = opts or {}
    local shape = type(name) == "string" and name:match "^random:(.+)$"
    if shape then
        local model = M.new(require("lolcats.models.shapes").find(shape), opts)
        model.source = name
        return model
    end
    local checkpoint = require "lolcats.reference_checkpoint"
    if checkpoint.is_named(name) and files.is_file(name) then return checkpoint.open(name, opts) end
    local path = hub.resolve(name, opts)
    local how = read_opts(opts)
    how.source = name
    if files.is_dir(path) then
        local linearize = require "lolcats.linearize"
        if linearize.is_saved(path) then return linearize.load(path, opts) end
        if files.exists(path .. "/adapter_config.json") and not files.exists(path .. "/config.json") then
            return load_adapter(path, opts)
        end
        return load_folder(path, how)
    end
    local format = files.tensor_format(path)
    if format == "safetensors" or format == "torch" or path:match "%.index%.json$" then
        how.source = path:match "^(.*)/[^/]+$" or "."
        how.weights = path
        return load_folder(how.source, how)
    end
    return M.load_gguf(path, how)
end

--- A model with random weights. config: Hugging Face's keys. opts: dtype, device, compute, tokenizer.
function M.new(raw, opts)
    opts = opts or {}
    local how = read_opts(opts)
    local given = {}
    for k, v in pairs(raw) do given[k] = v end
    given.model_type = given.model_type or "llama"
    given.num_key_value_heads = given.num_key_value_heads or given.num_attention_heads
    local c = config.normalize(given, "the config")
    c.initializer_range = raw.initializer_range
    local stop = {}
    add_ids(stop, ids_of(c.eos_token_id))
    return llama.new(c, weights.random(c, how), { dtype = how.compute, device = how.device, tokenizer = opts.tokenizer,
                                                  special = { stop = stop } })
end

return M
