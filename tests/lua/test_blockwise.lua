-- test_blockwise.lua: models in pieces: parts of a model, block-wise linearizing with inputs from disk, memory and
-- anew, killed and resumed, stitched; and that its peak memory does not depend on the number of blocks.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"
local data_module = require "lolcats.data"
local blockwise = require "lolcats.blockwise"
local eval = require "lolcats.eval"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)

local function config(layers, hidden)
    return { model_type = "llama", vocab_size = 61, hidden_size = hidden or 32, intermediate_size = 2 * (hidden or 32),
             num_hidden_layers = layers, num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5,
             max_position_embeddings = 256, tie_word_embeddings = false, initializer_range = 0.2 }
end

local function model_folder(layers, hidden)
    local dir = ("%s/m%d-%d"):format(root, layers, hidden or 32)
    if not files.exists(dir .. "/config.json") then
        lc.manual_seed(1)
        lc.model(config(layers, hidden)):save_weights(dir)
    end
    return dir
end

local function rows(n, seq)
    return data_module.from_ids(t.ids((n + 3) * seq + 2, 61), { seq = seq, hold_out = 3, name = "random" })
end

local function options(out, more)
    local o = { model = model_folder(5), out = root .. "/" .. out, data = rows(10, 24), layers = 2, student = { window = 4 },
                transfer = { steps = 12, lr = 1e-2, eval_every = 6 }, lora = { steps = 10, lr = 2e-3, rank = 2, alpha = 4, eval_every = 5 },
                shard = 4, eval_rows = 2, quiet = true }
    for k, v in pairs(more or {}) do o[k] = v end
    return o
end

local function text(dir) return files.read(dir .. "/student.safetensors") end

t.test("a part of a model is that part", function()
    local dir = model_folder(5)
    local whole, part = lc.load(dir), lc.load(dir, { part = { first = 3, last = 4 } })
    local hidden = {}
    local ids = lc.tensor({ { 3, 9, 27, 20, 60, 1 } }, { dtype = "i32" })
    lc.no_grad(whole.forward, whole, ids, { hidden = hidden })
    t.close(lc.no_grad(blockwise.through, part, hidden[2]), hidden[4], 0)
    t.eq(part.layers[1].proj.q_proj.name, "model.layers.2.self_attn.q_proj")
    t.errors(function() lc.load(dir, { part = { first = 3, last = 6 } }) end, "layers 3 to 6 of a model that has 1 to 5")
end)

local first
t.test("blocks from disk, from memory and anew give the same student; stitched, it loads", function()
    local results = {}
    for _, kind in ipairs { "disk", "memory", "recompute" } do
        local bw = blockwise.new(options(kind, { inputs = kind }))
        t.eq(#bw.blocks, 3)
        local dir = bw:train()
        results[kind] = text(dir)
        if kind == "disk" then
            first = results.disk
            local student = lc.load(dir, { base = model_folder(5) })
            local held = bw.data.held:list(3)
            local want = lc.no_grad(eval.perplexity_rows, student, held)
            t.close({ bw:perplexity(held).ppl }, { want.ppl }, 1e-5)
            t.close({ bw:perplexity(held, { teacher = true }).ppl },
                    { lc.no_grad(eval.perplexity_rows, lc.load(model_folder(5)), held).ppl }, 1e-5)
            t.eq(#student:trained(), 5 * 3 + 5 * 8)
            for _, name in ipairs(files.list(root .. "/disk/hidden")) do
                t.eq(files.list(root .. "/disk/hidden/" .. name), {}, "inputs are removed as they are used up")
            end
        end
    end
    t.ok(results.disk == results.memory, "memory")
    t.ok(results.disk == results.recompute, "recompute")
end)

t.test("both stages learn; the other objective and kept layers work", function()
    for b = 1, 3 do
        for _, stage in ipairs { "transfer", "lora" } do
            local lines = {}
            for line in files.read(("%s/disk/b%02d-%s/metrics.jsonl"):format(root, b, stage)):gmatch "[^\n]+" do
                local row = files.parse_json(line)
                if row.eval then lines[#lines + 1] = row.eval.loss end
            end
            t.ok(lines[#lines] < lines[1] * 1.02, ("block %d %s: %g to %g"):format(b, stage, lines[1], lines[#lines]))
        end
    end
    local bw = blockwise.new(options("kept", { student = { window = 4, softmax_layers = { 1, 2, -1 } },
                                               lora = { steps = 4, lr = 1e-3, rank = 2, objective = "attention" } }))
    local student = lc.load(bw:train(), { base = model_folder(5) })
    local count = 0
    for _, layer in ipairs(student.layers) do count = count + (layer.student and 1 or 0) end
    t.eq(count, 2)
    local held = bw.data.held:list(2)
    t.close({ bw:perplexity(held).ppl }, { lc.no_grad(eval.perplexity_rows, student, held).ppl }, 1e-5)
    t.errors(function() blockwise.new(options("kept", { layers = 3 })) end, "holds another block%-wise run")
    t.errors(function() blockwise.new(options("no", { inputs = "net" })) end, "'disk', 'memory' or 'recompute'")
    t.errors(function() blockwise.new(options("no", { layer = 2 })) end, "no option 'layer'")
end)

t.test("every kind of student, optimizer and schedule; stitched, it is the same", function()
    for i, student in ipairs { { window = 4, kind = "sliding", sinks = 2, affine = true, window_factor = 1 },
                               { window = 0, kind = "linear", map = "t2r", init = "kaiming", tie_qk = true },
                               { window = 4, kernel = "adapter", train_window_factor = false },
                               { window = 4, map = "performer" }, { window = 4, map = "cosformer" } } do
        local bw = blockwise.new(options("kind" .. i, {
            student = student, layers = 3, transfer = { steps = 3, lr = 1e-3, optim = "sgd", optim_options = { momentum = 0.9 },
                                                        schedule = { name = "cosine_warmup", num_warmup_steps = 1 } },
            lora = { steps = 2, optim = "adafactor", lr = 1e-2, rank = 2, targets = { "q_proj", "o_proj" },
                     schedule = { name = "reduce_lr_on_plateau", patience = 1, min_lr = 0 } },
        }))
        local held = bw.data.held:list(2)
        local loaded = lc.load(bw:train(), { base = model_folder(5) })
        t.close({ bw:perplexity(held).ppl }, { lc.no_grad(eval.perplexity_rows, loaded, held).ppl }, 1e-5)
        for k, v in pairs(student) do t.eq(loaded.settings[k], v, k) end
    end
end)

t.test("begun anew, it leaves alone what is not its own", function()
    files.make_dirs(root .. "/outside-own/model")
    files.write(root .. "/outside-own/model/notes.txt", "mine")
    blockwise.new(options("outside-own")):train()
    local bw = blockwise.new(options("outside-own", { layers = 3, fresh = true }))
    t.ok(not bw:done(1) and not files.exists(root .. "/outside-own/student/student.json"))
    t.eq(files.read(root .. "/outside-own/model/notes.txt"), "mine")
    t.ok(bw:train())
end)

t.test("hidden states in a folder of their own, which another model or other data may not take", function()
    local hidden = root .. "/elsewhere"
    local bw = blockwise.new(options("outside", { hidden = hidden }))
    t.ok(text(bw:train()) == first)
    t.ok(not files.exists(root .. "/outside/hidden") and files.exists(hidden .. "/blockwise.json"))
    blockwise.new(options("outside2", { hidden = hidden, lora = false })) -- other training on the same inputs
    t.errors(function() blockwise.new(options("outside3", { hidden = hidden, dtype = "bf16" })) end, "elsewhere holds another .*dtype: \"f32\" there, \"bf16\" here")
    t.errors(function() blockwise.new(options("outside", { hidden = hidden, seed = 3 })) end, "outside holds another .*seed: 0 there, 3 here")
end)

t.test("stopped anywhere, it goes on to the same result", function()
    for _, kind in ipairs { "disk", "recompute" } do
        local stops = { { 1, "transfer", 5 }, { 1, "lora", 3 }, { 2, "lora", 9 }, { 3, "transfer", 1 } }
        local out = "stopped-" .. kind
        for _, s in ipairs(stops) do
            local bw = blockwise.new(options(out, { inputs = kind, stop_after = function(b, stage, run)
                return b == s[1] and stage == s[2] and run.step >= s[3]
            end }))
            t.eq(bw:train(), nil)
            lc.train.current = nil
        end
        t.ok(text(blockwise.new(options(out, { inputs = kind })):train()) == first, kind)
    end
    -- killed while a block's outputs were being written: some of the next block's inputs are missing
    local bw = blockwise.new(options("torn", { stop_after = function(b) return b == 2 end }))
    bw:train()
    files.remove(root .. "/torn/hidden/b02/00002.safetensors")
    files.remove(root .. "/torn/hidden/b02/00000.safetensors")
    t.ok(text(blockwise.new(options("torn")):train()) == first)
end)

t.test("peak memory does not depend on the number of blocks", function()
    -- a 70B model's shape, each size a 64th: 80 layers in blocks of 5, eight query heads a key head
    local function big(layers)
        local dir = ("%s/big%d"):format(root, layers)
        lc.manual_seed(1)
        local c = config(layers, 128)
        c.num_attention_heads, c.num_key_value_heads, c.intermediate_size = 8, 1, 448
        lc.model(c):save_weights(dir)
        return dir
    end
    local function peak(layers, kind, watched)
        local dir = big(layers)
        collectgarbage() collectgarbage()
        lc.trim()
        local before = lc.memory "live"
        lc.reset_peak()
        local bw = blockwise.new { model = dir, data = rows(6, 64),
                                   out = ("%s/peak-%s%d-%d"):format(root, kind, layers, watched or 1),
                                   layers = 5, student = { window = 16 }, transfer = { steps = 2 }, lora = { steps = 2 }, shard = 3,
                                   eval_rows = watched or 1, inputs = kind, quiet = true }
        bw:train()
        local most = lc.memory "peak" - before
        collectgarbage() collectgarbage()
        return most, lc.memory "live" - before
    end
    for _, kind in ipairs { "disk", "recompute" } do
        local a, left_a = peak(10, kind)
        local b, left_b = peak(kind == "disk" and 80 or 30, kind)
        t.ok(b <= 1.05 * a, ("%s: %d bytes with 2 blocks, %d with many"):format(kind, a, b))
        t.ok(left_b <= left_a + 65536, ("%s: %d bytes stay with 2 blocks, %d with many"):format(kind, left_a, left_b))
    end
    local a, b = peak(10, "disk", 2), peak(10, "disk", 3)
    local held = 64 * 128 * 4 -- hidden states of one more row
    t.ok(b <= 1.02 * a + held, ("%d bytes while two held-out rows are watched, %d with three"):format(a, b))
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
