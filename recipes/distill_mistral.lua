-- distill_mistral.lua: linearize Mistral-7B with the paper's settings; --tiny runs all of it on a small random model.
--   lolcats distill_mistral --model DIR --data alpaca_data_cleaned.json
--   lolcats distill_mistral --tiny
local lc = require "lolcats"
local files = lc.files

local tiny = false
for _, word in ipairs(arg) do tiny = tiny or word == "--tiny" end

-- A tokenizer of Mistral's form without merges: letters, and bytes for the rest.
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
        added[i] = { id = i - 1, content = token, single_word = false, lstrip = false, rstrip = false, normalized = false, special = true }
    end
    local bos = { SpecialToken = { id = "<s>", type_id = 0 } }
    return {
        version = "1.0", added_tokens = added,
        normalizer = { type = "Sequence", normalizers = {
            { type = "Prepend", prepend = "▁" }, { type = "Replace", pattern = { String = " " }, content = "▁" } } },
        post_processor = { type = "TemplateProcessing", single = { bos, { Sequence = { id = "A", type_id = 0 } } },
                           pair = { bos, { Sequence = { id = "A", type_id = 0 } }, { Sequence = { id = "B", type_id = 1 } } },
                           special_tokens = { ["<s>"] = { id = "<s>", ids = { 1 }, tokens = { "<s>" } } } },
        decoder = { type = "Sequence", decoders = { { type = "Replace", pattern = { String = "▁" }, content = " " },
                    { type = "ByteFallback" }, { type = "Fuse" }, { type = "Strip", content = " ", start = 1, stop = 0 } } },
        model = { type = "BPE", unk_token = "<unk>", fuse_unk = true, byte_fallback = true, vocab = vocab, merges = files.array {} },
    }, n
end

-- Mistral's shape, small and random: grouped heads, an output matrix of its own, its rotary base.
local function write_tiny(dir)
    local json, n = tokenizer()
    local model = lc.model {
        model_type = "mistral", vocab_size = n, hidden_size = 64, intermediate_size = 176, num_hidden_layers = 3, num_attention_heads = 4,
        num_key_value_heads = 2, max_position_embeddings = 4096, rms_norm_eps = 1e-5, rope_theta = 10000, tie_word_embeddings = false,
        bos_token_id = 1, eos_token_id = 2,
    }
    model:save_weights(dir)
    files.write_json(dir .. "/tokenizer.json", json)
    files.write_json(dir .. "/tokenizer_config.json", { bos_token = "<s>", eos_token = "</s>" })
end

-- Text for it, when none is named: the recipes' own.
local function write_text(path)
    local program, parts = require "lolcats.program", {}
    for _, name in ipairs(program.files()) do
        if name:match "^recipes/" or name:match "^lua/lolcats/[%w_]+%.lua$" then parts[#parts + 1] = program.source(name) end
    end
    files.write(path, table.concat(parts, "\n"))
end

local defaults = {
    doc = "Linearize Mistral-7B with the paper's settings: attention transfer, then LoRA.",
    model = "mistralai/Mistral-7B-v0.1", data = "yahma/alpaca-cleaned", out = "runs/mistral", seq = 1024, hold_out = 200, eval_rows = 32,
    dtype = "bf16", epochs = 2, accumulate = 8, transfer_lr = 1e-2, lora_lr = 1e-4, schedule = "plateau", eval_every = 100, rank = 8, alpha = 16,
    more = { { "tiny", false, "a small random model of the same shape, written to OUT/model, and little text: to see it run" } },
}
if tiny then
    for k, v in pairs { model = "OUT/model", data = "OUT/text.txt", out = "runs/mistral_tiny", seq = 128, window = 16, hold_out = 0.05,
                        eval_rows = 8, transfer_steps = 20, lora_steps = 20, accumulate = 2, eval_every = 10, sample = 16 } do
        defaults[k] = v
    end
    function defaults.prepare(args)
        if args.model == "OUT/model" then
            args.model = args.out .. "/model"
            lc.manual_seed(args.seed)
            if not files.exists(args.model .. "/config.json") then write_tiny(args.model) end
        end
        if args.data == "OUT/text.txt" then
            args.data = args.out .. "/text.txt"
            if not files.exists(args.data) then write_text(args.data) end
        end
    end
end

lc.recipe "distill" (defaults)
