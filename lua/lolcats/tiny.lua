-- tiny.lua: what a recipe's --tiny runs on: a small random model of a family's shape with a tokenizer of letters and
-- bytes, and data made of the program's own text. Everything is written below the run's folder, so that a second run
-- finds the same.
local lc = require "lolcats"
local files = require "lolcats.files"
local program = require "lolcats.program"

local M = {}

-- A tokenizer of SentencePiece's form without merges: letters, and bytes for the rest.
local function tokenizer()
    local vocab, n = {}, 0
    local function add(token)
        vocab[token] = n
        n = n + 1
    end
    for _, token in ipairs { "<unk>", "<s>", "</s>" } do add(token) end
    for byte = 0, 255 do add(("<0x%02X>"):format(byte)) end
    add "▁"
    for byte = 33, 126 do add(string.char(byte)) end
    local added = {}
    for i, token in ipairs { "<unk>", "<s>", "</s>" } do
        added[i] = { id = i - 1, content = token, single_word = false, lstrip = false, rstrip = false,
                     normalized = false, special = true }
    end
    local bos = { SpecialToken = { id = "<s>", type_id = 0 } }
    return {
        version = "1.0", added_tokens = added,
        normalizer = { type = "Sequence", normalizers = {
            { type = "Prepend", prepend = "▁" },
            { type = "Replace", pattern = { String = " " }, content = "▁" } } },
        post_processor = { type = "TemplateProcessing", single = { bos, { Sequence = { id = "A", type_id = 0 } } },
                           pair = { bos, { Sequence = { id = "A", type_id = 0 } },
                                    { Sequence = { id = "B", type_id = 1 } } },
                           special_tokens = { ["<s>"] = { id = "<s>", ids = { 1 }, tokens = { "<s>" } } } },
        decoder = { type = "Sequence", decoders = { { type = "Replace", pattern = { String = "▁" }, content = " " },
                    { type = "ByteFallback" }, { type = "Fuse" },
                    { type = "Strip", content = " ", start = 1, stop = 0 } } },
        model = { type = "BPE", unk_token = "<unk>", fuse_unk = true, byte_fallback = true, vocab = vocab,
                  merges = files.array {} },
    }, n
end

local LLAMA3 = { rope_type = "llama3", factor = 8, low_freq_factor = 1, high_freq_factor = 4,
                 original_max_position_embeddings = 8192 }
local SHAPES = {
    mistral = { model_type = "mistral", rope_theta = 10000, rms_norm_eps = 1e-5 },
    llama3 = { model_type = "llama", rope_theta = 500000, rms_norm_eps = 1e-5 },
    llama3_1 = { model_type = "llama", rope_theta = 500000, rms_norm_eps = 1e-5, rope_scaling = LLAMA3 },
}

--- Writes a model folder. family: mistral, llama3, llama3_1. more: keys of config.json (num_hidden_layers = 3,
--- hidden_size = 64, ...).
function M.write_model(dir, family, more)
    local json, n = tokenizer()
    local shape = SHAPES[family] or lc.fail("there is no tiny %s", tostring(family))
    local config = { vocab_size = n, hidden_size = 64, intermediate_size = 176, num_hidden_layers = 3,
                     num_attention_heads = 4,
                     num_key_value_heads = 2, max_position_embeddings = 4096, tie_word_embeddings = false,
                         bos_token_id = 1, eos_token_id = 2 }
    for k, v in pairs(shape) do config[k] = v end
    for k, v in pairs(more or {}) do config[k] = v end
    lc.model(config):save_weights(dir)
    files.write_json(dir .. "/tokenizer.json", json)
    files.write_json(dir .. "/tokenizer_config.json", { bos_token = "<s>", eos_token = "</s>" })
end

local function own_text()
    local parts = {}
    for _, name in ipairs(program.files()) do
        if name:match "^recipes/" or name:match "^lua/lolcats/[%w_]+%.lua$" then
            parts[#parts + 1] = program.source(name)
        end
    end
    return table.concat(parts, "\n")
end

--- Writes text: the program's own recipes and modules.
function M.write_text(path) files.write(path, own_text()) end

--- Writes n records in Alpaca's form, made of lines of the program's text.
function M.write_records(path, n)
    local lines, records = {}, {}
    for line in own_text():gmatch "%-%- (%u[^\n]+)" do lines[#lines + 1] = line end
    for i = 1, n do
        local a, b, c = lines[(i * 7) % #lines + 1], lines[(i * 13) % #lines + 1], lines[(i * 29) % #lines + 1]
        records[i] = { instruction = a, input = i % 3 == 0 and b or "", output = c }
    end
    files.write_json(path, records)
end

--- Was --tiny given?
function M.wanted()
    for _, word in ipairs(rawget(_G, "arg") or {}) do
        if word == "--tiny" then return true end
    end
    return false
end

--- Makes what a --tiny run names as OUT/model, OUT/text.txt or OUT/records.json in the folder `out`; returns model and
--- data paths. seed: of the model's weights.
function M.prepare(out, model, data, family, seed, more)
    if model == "OUT/model" then
        model = out .. "/model"
        lc.manual_seed(seed or 0)
        if not files.exists(model .. "/config.json") then M.write_model(model, family, more) end
    end
    local kind = data and data:match "^OUT/(.+)$"
    if kind then
        data = out .. "/" .. kind
        if not files.exists(data) then
            files.make_dirs(out)
            if kind:match "%.json$" then M.write_records(data, 400) else M.write_text(data) end
        end
    end
    return model, data
end

--- Puts a tiny run's settings over a recipe's defaults when --tiny was given, and makes the model and the data before
--- it starts.
function M.apply(defaults, family, more)
    defaults.more = defaults.more or {}
    table.insert(defaults.more,
                 { "tiny", false, "a small random model of the same shape, written to OUT/model, and little text: to see it run" })
    if not M.wanted() then return defaults end
    for k, v in pairs { model = "OUT/model", data = "OUT/text.txt", out = defaults.out .. "_tiny", seq = 128,
                        window = 16, hold_out = 0.05,
                        eval_rows = 8, transfer_steps = 20, lora_steps = 20, accumulate = 2, eval_every = 10,
                            sample = 16, dtype = "bf16" } do
        defaults[k] = v
    end
    for k, v in pairs(more or {}) do defaults[k] = v end
    local shape = defaults.tiny_shape
    function defaults.prepare(args)
        args.model, args.data = M.prepare(args.out, args.model, args.data, family, args.seed, shape)
    end
    return defaults
end

return M
