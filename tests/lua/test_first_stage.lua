-- test_first_stage.lua: what a first stage may have beside feature maps: adapters that learn in it (gradients against
-- differences, merging, saving, the reference's files), the quirks "flow" and "window", rotary frequencies of the
-- linearized layers' own, and training state with bfloat16's digits.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = lc.files
local tiny, configs = require "lolcats.tiny", require "lolcats.configs"

local root = os.tmpname()
os.remove(root)
files.make_dirs(root)

local CONFIG = { model_type = "llama", vocab_size = 43, hidden_size = 24, intermediate_size = 32, num_hidden_layers = 3,
                 num_attention_heads = 4, num_key_value_heads = 2, rms_norm_eps = 1e-5, max_position_embeddings = 64,
                 initializer_range = 0.3 }

local function model(more)
    local c = {}
    for k, v in pairs(CONFIG) do c[k] = v end
    for k, v in pairs(more or {}) do c[k] = v end
    lc.manual_seed(5)
    return lc.model(c, { dtype = "f64" })
end

local function ids(n, seed) return t.ids(n, 43, seed) end

local function logits(m, row) return lc.no_grad(m.logits, m, row) end
local function shake(list)
    for _, p in ipairs(list) do p.tensor:detach():add_(lc.randn(p.tensor.shape, { dtype = "f64" }), 0.1) end
end

-- The slope of the loss along one entry of each of the last layer's parameters, against what backward gives. (Targets
-- are constants to the gradient; those of other layers move with what stands before them.)
local function check_slopes(s, opts)
    local rows = { ids(13, 1), ids(13, 2) }
    local list = s:trainable()
    for _, p in ipairs(list) do p.tensor:zero_grad() end
    s:transfer(rows, opts)
    local look = { backward = false, mse = opts.mse, xent = opts.xent }
    for i, p in ipairs(list) do if p.name:match "layers%.2%." then
        local flat, at = p.tensor:detach():reshape(-1), 1 + (7 * i) % p.tensor:numel()
        local entry, eps = flat:narrow(1, at, 1), 1e-5
        local value = entry:item()
        local function loss(x)
            entry:fill_(x)
            return (s:transfer(rows, look))
        end
        local slope = (loss(value + eps) - loss(value - eps)) / (2 * eps)
        entry:fill_(value)
        local got = p.tensor.grad and p.tensor.grad:reshape(-1):narrow(1, at, 1):item() or 0
        t.ok(math.abs(got - slope) < 1e-4 * math.max(1, math.abs(slope)),
             ("%s: %.8g, expected %.8g"):format(p.name, got, slope))
    end end
end

t.test("adapters learn in the first stage: gradients of feature maps and adapters", function()
    local s = lc.linearize(model(), { window = 4, map = "softmax_dim", feature_dim = 5 })
    s:add_lora { rank = 2, alpha = 4, targets = { "o_proj" } }
    shake(s:trainable())
    check_slopes(s, { mse = 1000, xent = 1 })
    local n = 0
    for _, p in ipairs(s:trainable()) do n = n + (p.name:match "lora" and 1 or 0) end
    t.eq(n, 6)
    local before = s:transfer({ ids(13) }, { backward = false })
    local loss, each = s:transfer({ ids(13) }, { mse = 1000, xent = 1 })
    t.ok(loss > before and #each == 3)
    local last, first = nil, nil
    for _, p in ipairs(s:trainable()) do
        if p.name:match "layers.2.self_attn.o_proj.lora_B" then last = p.tensor.grad end
        if p.name:match "layers.0.self_attn.o_proj.lora_B" then first = p.tensor.grad end
    end
    t.ok(not last or last:abs():amax():item() == 0, "nothing reads the last layer's output")
    t.ok(first:abs():amax():item() > 0, "the first layer's reaches the losses of the others")
    local plain = lc.linearize(model(), { window = 4, map = "softmax_dim", feature_dim = 5 })
    local lora = lc.linearize(model(), { window = 4, map = "softmax_dim", feature_dim = 5 })
    lora:add_lora {} -- B is 0: the maps learn the same, on either path
    local a, b = plain:transfer({ ids(13) }, { xent = 1 }), lora:transfer({ ids(13) }, { xent = 1 })
    t.close({ a }, { b }, 1e-9)
    local want = plain:map_params()
    for i, p in ipairs(lora:map_params()) do t.close(p.tensor.grad, want[i].tensor.grad, 1e-10, p.name) end
    t.errors(function() lora:transfer_long({ ids(13) }, {}) end, "first stage")
end)

t.test("adapters of the first stage are merged, kept and loaded", function()
    local base = model()
    base:save_weights(root .. "/base")
    base = lc.load(root .. "/base", { dtype = "f64" })
    local s = lc.linearize(base, { window = 4 })
    s:add_lora { rank = 2, alpha = 6, targets = { "q_proj", "v_proj" } }
    shake(s:trainable())
    local want, plain = logits(s, ids(15)), logits(base, ids(15))
    s:merge_first_lora()
    t.close(logits(s, ids(15)), want, 1e-10)
    t.close(logits(base, ids(15)), plain, 0, "the teacher keeps its weights")
    s:use_linear():add_lora { rank = 3 }
    shake(require("lolcats.lora").parameters(s))
    want = logits(s, ids(15))
    s:save(root .. "/student")
    t.close(logits(lc.load(root .. "/student", { dtype = "f64" }), ids(15)), want, 1e-10)
    t.errors(function() lc.linearize(base, { window = 4 }):merge_first_lora() end, "no adapters")
end)

t.test("compat 'flow': the student's outputs go on", function()
    local s = lc.linearize(model(), { attention = "lolcats_llama_window_tk_fa2", window = 3, compat = "flow",
                                      map = "relu", bias = true })
    shake(s:trainable())
    check_slopes(s, { mse = 1000, xent = 1 })
    local own = lc.linearize(model(), { window = 3, map = "relu", bias = true })
    for i, p in ipairs(own:map_params()) do p.tensor:detach():copy_(s:map_params()[i].tensor) end
    s:transfer({ ids(13) })
    own:transfer({ ids(13) })
    local a, b = s:map_params(), own:map_params()
    t.ok((a[1].tensor.grad - b[1].tensor.grad):abs():amax():item() > 1e-6,
         "the first layer's maps feel the losses of later layers")
    t.ok(lc.linearize(model(), { attention = "lolcats_llama_window_tk_fa2", window = 3, compat = "reference" }).flows)
    t.ok(not lc.linearize(model(), { attention = "lolcats_llama_window_tk", window = 3, compat = "reference" }).flows)
end)

t.test("compat 'window': a model's sliding window is left out", function()
    local m, whole = model { model_type = "mistral", sliding_window = 5 }, model { model_type = "mistral" }
    local row = ids(14)
    local plain, odd, wide = lc.linearize(m, { window = 3 }), lc.linearize(m, { window = 3, compat = "window" }),
        lc.linearize(whole, { window = 3 })
    t.close({ odd:transfer({ row }) }, { wide:transfer({ row }) }, 1e-10)
    t.ok(math.abs(plain:transfer({ row }) - wide:transfer({ row })) > 1e-6)
    local kept = lc.linearize(m, { softmax_layers = { 1, 2, 3 }, compat = "window" })
    t.close(logits(kept, row), logits(whole, row), 1e-10)
    t.ok((logits(m, row) - logits(whole, row)):abs():amax():item() > 1e-6, "the teacher by itself keeps it")
end)

t.test("linearized layers with rotary frequencies of their own", function()
    local other = model { rope_theta = 300, rope_scaling = { rope_type = "linear", factor = 3 } }
    local own = { rope_theta = 300, rope_scaling_type = "linear", rope_scaling_factor = 3 }
    local row = ids(19)
    local s, want = lc.linearize(model(), { window = 4, rotary = own }), lc.linearize(other, { window = 4 })
    t.close(logits(s, row), logits(want, row), 1e-10)
    t.close({ s:transfer({ row }) }, { want:transfer({ row }) }, 1e-9)
    local state, rows, at = s:new_state(), {}, 0
    for _, n in ipairs { 9, 1, 1, 8 } do
        rows[#rows + 1] = s:lm_head(s:forward({ unpack(row, at + 1, at + n) }, { state = state }))
        at = at + n
    end
    t.close(lc.cat(rows, 2), logits(want, row), 1e-10)
    -- kept layers turn as the model does
    local kept = lc.linearize(model(), { softmax_layers = { 1, 2, 3 }, rotary = own })
    t.close(logits(kept, row), logits(model(), row), 1e-12)
    -- texts longer than what the frequencies are for
    local dynamic = model { rope_scaling = { rope_type = "dynamic", factor = 2 }, max_position_embeddings = 8 }
    s = lc.linearize(model(),
                     { window = 4, rotary = { rope_scaling_type = "dynamic", rope_scaling_factor = 2,
                                              max_position_embeddings = 8 } })
    t.close(logits(s, row), logits(lc.linearize(dynamic, { window = 4 }), row), 1e-10)
    s:save(root .. "/rotary")
    local again = require("lolcats.linearize").load(root .. "/rotary", { base = model() })
    t.close(logits(again, row), logits(s, row), 1e-12)
    t.errors(function() lc.linearize(model(), { rotary = { rope_scaling_type = "yarn" } }) end,
             "'linear', 'dynamic' or nothing")
    t.errors(function() lc.linearize(model(), { rotary = { head_dim = 128 } }) end, "heads have 6")
    t.errors(function() lc.linearize(model(), { rotary = { theta = 1 } }) end, "no setting 'theta'")
end)

t.test("a configuration with peft and rotary_config, all quirks, in bfloat16: both stages, and its files again",
       function()
    lc.manual_seed(1)
    tiny.write_model(root .. "/lama", "llama3_1", { num_hidden_layers = 2, initializer_range = 0.3 })
    tiny.write_records(root .. "/records.json", 60)
    local name = "distill_mine_fd8"
    local text = files.read((arg[0]:match "^(.*/)" ..
                             "../../recipes/configs/model/distill_llama3_1_8b_lk_smd_wtk64_fd64_w01.yaml"))
    text = text:gsub("\nattention:\n",
                     "\nattention:\n  peft:\n    method: lora\n    kwargs:\n      r: 2\n      lora_alpha: 4\n" ..
                     "      target_modules: [\"self_attn.q_proj\", \"self_attn.o_proj\"]\n  rotary_config:\n    " ..
                         "rope_theta: 777.0\n    head_dim: 16\n", 1)
    files.make_dirs(root .. "/configs/model")
    files.write(root .. "/configs/model/" .. name .. ".yaml", text)
    local tree = configs.load("model", name, root .. "/configs")
    t.eq(configs.first_lora_options(tree), { rank = 2, alpha = 4, targets = { "q_proj", "o_proj" } })
    local me = os.getenv "LOLCATS_PROGRAM" or require("lolcats.program").path
    local flags = ("--model_config %s --config_dir configs --pretrained_model_name_or_path '%s/lama' --data " ..
        "records.json --dataset_chunk_size 100 " ..
        "--window_size 8 --lk_zero_init --max_eval_batches 1 --gradient_accumulation_steps 2 --max_steps 2 " ..
            "--eval_steps 1 --no_init_eval " ..
        "--distill_config distill_alpaca_clean_xent1_mse1000_lr1e-2 --finetune_config " ..
            "finetune_lora_qkvo_alpaca_clean"):format(name, root)
    local function run(more)
        local status = os.execute(("cd '%s' && '%s' distill %s %s > said.out 2> said.err < /dev/null"):format(root, me,
            flags, more))
        return status, files.read(root .. "/said.err")
    end
    local status, err = run "--compat reference --dtype bf16"
    t.eq(status, 0, err)
    t.ok(err:find("bfloat16's digits (AdamW, fused)", 1, true), err)
    local dir, distilled, tuned = root .. "/checkpoints/" .. name .. "/", nil, nil
    for _, file in ipairs(files.list(dir)) do
        if file:match "_distill%.pt$" then distilled = dir .. file elseif file:match "_ft%.pt$" then tuned = dir ..
            file end
    end
    local f = files.open_tensors(distilled)
    local all = table.concat(f:names(), " ")
    t.ok(all:find("base_model.model.model.layers.0.self_attn.o_proj.lora_B.default.weight", 1, true), all)
    t.ok(all:find("base_model.model.model.layers.1.self_attn.feature_map_k.mlp.layer", 1, true), all)
    f:close()
    local again = require("lolcats.reference_checkpoint").open(tuned,
                                                               { base = root .. "/lama", config_dir = root ..
                                                                 "/configs", distill = distilled })
    t.ok(again.first_lora and again.lora.rank == 8 and again.own_rotary.rope_theta == 777)
    t.ok(lc.count_nonfinite(logits(again, ids(20))):item() == 0)
end)

t.finish()
