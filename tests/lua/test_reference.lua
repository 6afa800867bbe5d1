-- The reference's command line on a small random model: names, paths, results file and checkpoints as it has them,
-- every flag, what a wrong one says, its ways with compat, loading and going on; the trainers by name.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local lc = require "lolcats"
local files = lc.files
local tiny, trainers, names = require "lolcats.tiny", require "lolcats.train.trainers", require "lolcats.run_name"
local stage, configs = require "lolcats.train.stage", require "lolcats.configs"

local me = os.getenv "LOLCATS_PROGRAM" or require("lolcats.program").path
local root = os.tmpname()
os.remove(root)
files.make_dirs(root)
lc.manual_seed(1)
tiny.write_model(root .. "/lama", "llama3_1", { num_hidden_layers = 2, initializer_range = 0.3 })
tiny.write_records(root .. "/records.json", 120)

local M, D, F = "distill_llama3_1_8b_lk_smd_wtk64_fd64_w01", "distill_alpaca_clean_xent0_mse1000_lr1e-2",
    "finetune_lora_qkvo_alpaca_clean"

-- Runs the recipe in the folder root/where; returns status, stdout, stderr.
local function distill(where, flags)
    files.make_dirs(root .. "/" .. where)
    local out = root .. "/said"
    local status = os.execute(("cd '%s/%s' && '%s' distill %s > '%s.out' 2> '%s.err' < /dev/null"):format(root, where,
            me, flags, out, out))
    if status > 255 then status = math.floor(status / 256) end
    return status, files.read(out .. ".out"), files.read(out .. ".err")
end

local COMMON = ("--pretrained_model_name_or_path '%s/lama' --data '%s/records.json' --dtype f32 --dataset_chunk_size 160 --window_size 8 " ..
    "--lk_zero_init --max_eval_batches 3 --gradient_accumulation_steps 2 --no_wandb"):format(root, root)
local BOTH = ("--model_config %s --distill_config %s --finetune_config %s "):format(M, D, F) .. COMMON
local FIRST = ("dl-d=%s-m=%s-f=%s-s=0-dcs=160-gas=2-ms=4-se=0-re=0-ws=8-lzi=1-pmnop=lama"):format(D, M, F)
local SECOND = FIRST .. "-dcs=160-bs=1-gas=2-nte=2-ms=4-se=0-re=0"

local function fits(name) return require("lolcats.reference_checkpoint").fits(name) end

t.test("both stages: files under the reference's names, its results file, its checkpoints", function()
    local status, out, err = distill("a", BOTH .. " --max_steps 4 --eval_steps 2 --max_new_tokens 5 --huggingface_token hf_secret")
    t.eq(status, 0, err)
    t.ok(os.execute(("grep -rq hf_secret '%s/a'"):format(root)) ~= 0, "a token is written nowhere")
    local dir = root .. "/a/checkpoints/" .. M .. "/"
    local csv = files.read(root .. "/a/results/" .. M .. "/" .. fits(SECOND .. "_ft.csv"))
    local head, one, two = csv:match "^([^\n]*)\n([^\n]*)\n([^\n]*)\n$"
    t.eq(head, ",eval_step,eval/loss,eval/ppl,eval/seq_len")
    t.ok(one:match "^0,2,%d+%.%d+,%d+%.%d+,160%.0$", one)
    t.ok(two:match "^1,4,%d+%.%d+,%d+%.%d+,160%.0$", two)
    local f = files.open_tensors(dir .. fits(FIRST .. "_distill.pt"))
    t.eq(#f:names(), 6)
    t.ok(table.concat(f:names(), " "):find("model.layers.1.self_attn.feature_map_k.mlp.layer", 1, true))
    t.eq(f:meta "step" or f:meta "model_state_dict.step" or 4, 4)
    f:close()
    f = files.open_tensors(dir .. fits(SECOND .. "_ft.pt"))
    t.eq(#f:names(), 16)
    t.ok(table.concat(f:names(), " "):find("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", 1,
                                           true))
    f:close()
    t.ok(out:find("--attn_mlp_checkpoint_path ./checkpoints/" .. M, 1, true), out)
    t.ok(out:find("> fine-tuned:", 1, true), out)
end)

t.test("the first stage is loaded instead of trained; the second goes on from its own file", function()
    local status, _, err = distill("a",
                                   BOTH .. " --max_steps 4 --eval_steps 2 --no_init_eval --load_distill_checkpoint default")
    t.eq(status, 0, err)
    t.ok(err:find("6 tensors loaded", 1, true), err)
    -- what stage 1 left in the names is gone
    t.ok(files.exists(root .. "/a/checkpoints/" .. M .. "/" .. fits(FIRST .. "-dcs=160-gas=2-ms=4-se=0-re=0_ft.pt")))
    status, _, err = distill("a", BOTH .. " --max_steps 2 --no_init_eval --load_distill_checkpoint 'checkpoints/" ..
                             M .. "/" ..
        fits(FIRST .. "_distill.pt") .. "' --load_finetune_checkpoint 'checkpoints/" .. M .. "/" ..
            fits(SECOND .. "_ft.pt") ..
        "' --resume_finetune")
    t.eq(status, 0, err)
    t.ok(err:find("16 tensors loaded", 1, true), err)
    status, _, err = distill("a", BOTH .. " --max_steps 2 --load_distill_checkpoint nowhere.pt")
    t.ok(status ~= 0 and err:find("there is no checkpoint nowhere.pt", 1, true), err)
end)

t.test("a checkpoint loads by its name: both stages, every flag in it", function()
    local dir = root .. "/a/checkpoints/" .. M .. "/"
    local ids = { { 1, 40, 33, 270, 300, 12, 90, 91, 17, 5, 60, 61, 62, 280, 20, 21, 22, 23, 24, 25 } }
    local both = lc.load(dir .. fits(SECOND .. "_ft.pt"), { base = root .. "/lama" })
    local first = lc.load(dir .. fits(FIRST .. "_distill.pt"), { base = root .. "/lama" })
    t.eq({ both.settings.window, both.settings.init, both.lora.rank, first.lora }, { 8, "identity", 8 })
    local hand = lc.linearize(lc.load(root .. "/lama"), { map = "softmax_dim", feature_dim = 64, window = 8 })
    local checkpoint = require "lolcats.reference_checkpoint"
    checkpoint.load(hand, dir .. fits(FIRST .. "_distill.pt"))
    hand:use_linear()
    t.close(first:logits(ids), hand:logits(ids), 1e-6)
    hand:add_lora { rank = 8, alpha = 16 }
    checkpoint.load(hand, dir .. fits(SECOND .. "_ft.pt"))
    t.close(both:logits(ids), hand:logits(ids), 1e-6)
    local condensed = dir .. "dl-d=x-m=" .. M .. "-f=xyz-s=0-ws=8-lzi=1_ft.pt"
    files.write(condensed, files.read(dir .. fits(SECOND .. "_ft.pt")))
    files.write((condensed:gsub("_ft%.pt", "_distill.pt")), files.read(dir .. fits(FIRST .. "_distill.pt")))
    t.close(lc.load(condensed, { base = root .. "/lama" }):logits(ids), hand:logits(ids), 1e-6)
    t.errors(function() checkpoint.open(root .. "/lama/model.pt") end, "does not say how it was made")
end)

t.test("compat takes the reference's ways and says so", function()
    local status, _, err = distill("c",
                                   BOTH .. " --max_steps 2 --eval_steps 2 --no_init_eval --compat reference --format folder")
    t.eq(status, 0, err)
    for _, what in ipairs { "trainer settings stand over the second's", "one batch more than max_eval_batches",
                            "means over chunks",
                            "terrace blocks counted from the end", "rounded to bfloat16" } do
        t.ok(err:find(what, 1, true), what .. "\n" .. err)
    end
end)

t.test("the first stage in blocks", function()
    local status, _, err = distill("b", BOTH .. " --max_steps 2 --eval_steps 2 --no_init_eval --layers_per_model 1")
    t.eq(status, 0, err)
    t.ok(err:find("6 tensors loaded", 1, true), err)
    local first = FIRST:gsub("ms=4", "ms=2")
    local f = files.open_tensors(root .. "/b/checkpoints/" .. M .. "/" .. fits(first .. "_distill.pt"))
    t.eq(#f:names(), 6)
    f:close()
    -- a file a block, under the names of the scripts for blocks; named one of them, all of them are loaded
    local last = root .. "/b/checkpoints/" .. first .. "-in=1-out=1_distill.pt"
    f = files.open_tensors(last)
    t.eq(#f:names(), 3)
    t.ok(table.concat(f:names(), " "):find("model.layers.0.self_attn.feature_map_k.mlp.layer", 1, true))
    f:close()
    -- and both stages in one, which loads by its name, and by hand with its adapters as the tensors have them
    local all = root .. "/b/ckpt_lora-" .. first .. "-ef=" .. F .. "-ft_lora=0-dcs=160-bs=1-gas=2-nte=2-ms=2-se=0-re=0-s=2.pt"
    all = fits(all)
    f = files.open_tensors(all)
    t.eq(#f:names(), 6 + 16)
    f:close()
    t.ok(lc.load(all, { base = root .. "/lama" }).lora.rank == 8)
    status, _, err = distill("b", ("--model_config %s --load_finetune_checkpoint '%s' --student s "):format(M, all) .. COMMON ..
                             " --no_init_eval")
    t.eq(status, 0, err)
    t.ok(err:find("22 tensors loaded", 1, true) and lc.load(root .. "/b/s").lora.rank == 8, err)
    status, _, err = distill("b", BOTH .. " --max_steps 2 --no_init_eval --load_distill_checkpoint '" .. last .. "'")
    t.eq(status, 0, err)
    t.ok(err:match "in=0%-out=0_distill.pt: 3 tensors loaded.*in=1%-out=1_distill.pt: 3 tensors loaded", err)
end)

t.test("names of the scripts for many GPUs, with folders in them", function()
    local m, d, f = "llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01",
        "llama3_1_70b/distill_alpaca_llama_70b_xent0_mse1000_lr1e-2", "llama3_1_70b/finetune_alpaca_llama_70b_qkvo"
    local words = ("--model_config %s --distill_config %s --finetune_config %s "):format(m, d, f) .. COMMON ..
        " --max_steps 2 --eval_steps 2 --no_init_eval --enable_fsdp --low_cpu_fsdp --fsdp_activation_checkpointing"
    local status, _, err = distill("f", words)
    t.eq(status, 0, err)
    local run = ("dl-d=%s-m=%s-f=%s-fac=1-dcs=160-gas=2-ms=2-se=0-re=0-lzi=1-pmnop=lama"):format(d, m, f)
    local dir = root .. "/f/checkpoints/" .. m .. "/"
    t.ok(files.exists(dir .. "distill-" .. run .. "/student.safetensors"))
    t.ok(files.exists(dir .. "finetune-" .. run .. "-dcs=160-gas=2-ms=2-se=0-re=0/student.safetensors"))
    status, _, err = distill("f", words .. " --load_distill_checkpoint default")
    t.eq(status, 0, err)
    t.ok(err:find("6 tensors loaded", 1, true), err)
end)

t.test("other trainers, optimizers and schedules by their names", function()
    files.make_dirs(root .. "/configs/experiment")
    files.write(root .. "/configs/experiment/first.yaml", [[
dataset: {name: alpaca_clean, dataset_config: {path: x, chunk_size: 96}}
dataloader: {batch_size: 2}
optimizer: {optim: adafactor, lr: 0.05}
lr_scheduler: {lr_scheduler_type: cosine_warmup, num_warmup_steps: 1, num_training_steps: 4}
trainer: {name: distill_attention_xent_mse, xent_factor: 1, mse_factor: 10, max_steps: 4, eval_steps: 2, num_save_ckpt_steps: 2}
]])
    files.write(root .. "/configs/experiment/second.yaml", [[
dataset: {name: alpaca_clean, dataset_config: {path: x, concat_data: false}}
dataloader: {batch_size: 3}
optimizer: {optim: sgd, lr: 0.05, momentum: 0.9}
lr_scheduler: {lr_scheduler_type: timm_cosine, t_initial: 2}
trainer: {name: mini_finetune_xent_mse, xent_factor: 0, max_steps: 2, eval_steps: 2, max_eval_batches: 2, max_step: 3}
finetune: {method: lora, kwargs: {r: 2, lora_alpha: 4, target_modules: [q_proj, self_attn.v_proj]}, trainable_weights: [window_factors]}
]])
    local status, _, err = distill(".",
                                   ("--model_config %s --distill_config first --finetune_config second "):format(M) ..
        COMMON:gsub("%-%-dataset_chunk_size 160 ", ""):gsub("%-%-gradient_accumulation_steps 2 ", "") ..
            " --no_init_eval --device cpu")
    t.eq(status, 0, err)
    t.ok(err:find("the key trainer.max_step (did you mean max_steps?) has no meaning", 1, true), err)
    local base = ("%s/checkpoints/%s/dl-d=first-m=%s-f=second-s=0-se=0-re=0-ws=8-lzi=1-pmnop=lama"):format(root, M, M)
    t.ok(files.exists(base .. "_distill_2.pt") and files.exists(base .. "_distill_4.pt") and
         files.exists(base .. "_distill.pt"))
    local f = files.open_tensors(base .. "-ms=4-se=0-re=0_ft.pt")
    t.eq(#f:names(), 10) -- q and v of two layers, and window factors
    f:close()
end)

t.test("what is wrong with a command line", function()
    local function says(flags, what)
        local status, _, err = distill("w", flags)
        t.ok(status ~= 0 and err:find(what, 1, true), err)
    end
    says(BOTH .. " --lk_zero_initt", "did you mean --lk-zero-init?")
    says("--distill_config " .. D, "--model-config is required")
    says(("--model_config %s --distill_config %s"):format(M, D .. "x"), "did you mean " .. D .. "?")
    says("--model_config distill_llama3_1_8b_lk_smd_wtk64_fd64_w1 ", "did you mean " .. M)
    says(BOTH .. " --max_steps 2.5", "takes a whole number")
    says(("--model_config %s --resume_finetune --load_finetune_checkpoint x.pt "):format(M) .. COMMON, "needs --finetune-config")
    says(BOTH .. " --load_distill_checkpoint no/such.pt", "there is no checkpoint no/such.pt")
    says(BOTH .. " --optim lion", "there is no optimizer 'lion'")
    says(BOTH .. " --compat all", "takes one of none, reference, terrace, rope")
    says(BOTH .. " --attention_type lolcats_lama", "did you mean 'lolcats_llama'")
end)

t.test("every flag of the reference is taken", function()
    local rows = require("lolcats.reference_flags").rows()
    local argv = {}
    for _, r in ipairs(rows) do
        argv[#argv + 1] = "--" .. r[1]
        if r.type == "number" then argv[#argv + 1] = "1" elseif r.type == "string" then argv[#argv + 1] = "x" end
    end
    local cli = require "lolcats.cli"
    rows[#rows + 1] = "all"
    local values = cli.parse(rows, argv)
    for _, r in ipairs(rows) do
        if type(r) == "table" then t.ok(values[r[1]] ~= nil, r[1]) end
    end
    for flag in ([[
        project_name model_config distill_config finetune_config eval_config pretrained_model_name_or_path
        load_distill_checkpoint resume_distill load_finetune_checkpoint resume_finetune attention_type learned_kernel
        lk_skip_connection lk_zero_init lk_normal_init tie_qk_kernels train_qk state_chunk_len window_size lr
        weight_decay optim scheduler gradient_accumulation_steps num_train_epochs max_steps max_finetune_steps
        no_peft_grad_ckpt batch_size num_workers no_init_eval eval_steps max_eval_batches huggingface_token
        checkpoint_dir results_dir replicate seed verbose no_wandb wandb_entity debug no_attention_mask no_cuda]]):gmatch "%S+" do
        t.ok(values[flag] ~= nil, flag)
    end
end)

-- ---- trainers -----------------------------------------------------------------------------------------------------
local function student(options)
    lc.manual_seed(3)
    local teacher = lc.load(root .. "/lama", { dtype = "f64" })
    return lc.linearize(teacher, options or { window = 4, map = "softmax_dim", feature_dim = 8 })
end
local ids = { { 1, 40, 33, 270, 300, 12, 90, 91, 17, 5, 60, 61, 62, 280 } }

t.test("adapters taught by attention: without adapters' effect it is the transfer loss; gradients are true", function()
    local s = student()
    local want = s:transfer(ids, { mse = 7, xent = 3, backward = false })
    s:use_linear():add_lora { rank = 2, alpha = 4 }
    t.close({ trainers.adapter_transfer(s, ids, { mse = 7, xent = 3, backward = false }) }, { want }, 1e-9)
    local q, o = s.layers[1].proj.q_proj.lora, s.layers[1].proj.o_proj.lora
    lc.no_grad(function()
        q.b:detach():normal_()
        o.b:detach():normal_()
    end)
    for _, projected in ipairs { false, true } do
        local how = { mse = 7, xent = projected and 0 or 3, projected = projected }
        for _, p in ipairs(s:trainable()) do
            if p.tensor.grad then p.tensor.grad:zero_() end
        end
        trainers.adapter_transfer(s, ids, how)
        local w = projected and o.a or q.a
        local got = w.grad:totable()[1][3]
        how.backward = false
        local view, eps = w:detach():narrow(1, 1, 1):narrow(2, 3, 1), 1e-5
        local function at(delta)
            lc.no_grad(function() view:add_(lc.full({ 1, 1 }, delta, { dtype = "f64" })) end)
            return trainers.adapter_transfer(s, ids, how)
        end
        local up = at(eps)
        local down = at(-2 * eps)
        at(eps)
        t.close({ got }, { (up - down) / (2 * eps) }, 1e-5)
        t.ok(math.abs(got) > 1e-7, "a gradient of nothing")
    end
    t.ok(s.layers[1].proj.q_proj.lora.on)
end)

t.test("evaluation: tokens count alike, or chunks as in the reference", function()
    local s = student()
    s:use_linear()
    local rows = { { ids = lc.tensor({ { 1, 40, 33, 270 } }, { dtype = "i32" }),
                     labels = lc.tensor({ { -100, 40, 33, 270 } }, { dtype = "i32" }) },
                   { ids = lc.tensor({ { 1, 90, 91, 17 } }, { dtype = "i32" }),
                     labels = lc.tensor({ { -100, -100, -100, 17 } }, { dtype = "i32" }) } }
    local a, n = s:nll(rows[1].ids, rows[1].labels)
    local b = s:nll(rows[2].ids, rows[2].labels)
    t.eq(n, 3)
    local lm = trainers.find "default_lm"
    local v = lm.evaluate(s, rows, {})
    t.close({ v.loss, v.ppl, v.seq_len }, { (a + b) / 4, math.exp((a + b) / 4), 4 }, 1e-9)
    v = lm.evaluate(s, rows, { reference = true })
    t.close({ v.loss, v.ppl }, { (a / 3 + b) / 2, (math.exp(a / 3) + math.exp(b)) / 2 }, 1e-9)
    t.errors(trainers.find, "did you mean default_lm%?", "defaultlm")
    t.eq(#trainers.names(), 10)
end)

t.test("in chunks: the same losses", function()
    local s = student { window = 4, map = "softmax_dim", feature_dim = 8, attention = "lolcats_long_llama_window_tk" }
    local row = { ids = lc.tensor(ids, { dtype = "i32" }), labels = lc.tensor(ids, { dtype = "i32" }) }
    local a = trainers.find("distill_attention_xent_mse").evaluate(s, { row }, { mse_factor = 7 }).loss
    local b = trainers.find("distill_attention_xent_mse_chunked").evaluate(s, { row },
            { mse_factor = 7, chunk = 4 }).loss
    t.close({ b }, { a }, 1e-9)
    s:use_linear():add_lora { rank = 2 }
    local got
    local run = { accumulate = 2, log = function(_, v) got = v.loss end }
    trainers.find("default_lm_chunked").step(s, row, run, { chunk = 4 })
    t.close({ got }, { trainers.find("default_lm").evaluate(s, { row }, {}).loss }, 1e-9)
end)

t.test("answers are scored by ROUGE", function()
    local fake = { generate = function(_, prompt) return prompt == "p1" and "the cat sat" or "" end }
    local s, texts = trainers.score_answers(fake,
                                            { { prompt = "p1", answer = "the cat sat" },
                                              { prompt = "p2", answer = "x" } })
    t.eq({ s["rouge/rouge1"], s.num_predicted, texts[1] }, { 50, 2, "the cat sat" })
end)

t.test("the results file: rows of later updates go when a run goes back", function()
    local path = root .. "/r/x.csv"
    stage.add_result(path, 100, { loss = 1.5, ppl = 4.5, seq_len = 1024 })
    stage.add_result(path, 200, { loss = 1.25, ppl = 3.5, seq_len = 1024 })
    stage.add_result(path, 200, { loss = 1, ppl = 2.75, seq_len = 1024 })
    t.eq(files.read(path), ",eval_step,eval/loss,eval/ppl,eval/seq_len\n0,100,1.5,4.5,1024.0\n1,200,1.0,2.75,1024.0\n")
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
