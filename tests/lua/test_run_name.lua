-- Names of runs and paths of checkpoints by the reference's rules: its own examples, then every flag, then the odd
-- corners.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local names = require "lolcats.run_name"
local configs = require "lolcats.configs"

local D, F = "distill_alpaca_clean_xent0_mse1000_lr1e-2", "finetune_lora_qkvo_alpaca_clean"
local M = "distill_llama3_1_8b_lk_smd_wtk64_fd64_w01"
local TRAINER = configs.load("experiment", D).trainer

local function flags(more)
    local out = { model_config = M, distill_config = D, finetune_config = F, lk_zero_init = true }
    for k, v in pairs(more or {}) do out[k] = v end
    return out
end

local function trainer(f)
    local tree = configs.load("experiment", D)
    return configs.override_experiment(tree, f).trainer
end

t.test("abbreviations", function()
    for name, short in pairs {
        lr = "lr", weight_decay = "wd", batch_size = "bs", gradient_accumulation_steps = "gas",
        num_train_epochs = "nte", max_steps = "ms",
        max_finetune_steps = "mfs", seed = "se", replicate = "re", attention_type = "at", learned_kernel = "lk",
        tie_qk_kernels = "tqk",
        train_qk = "tq", state_chunk_len = "scl", no_peft_grad_ckpt = "npgc", window_size = "ws",
        lk_skip_connection = "lsc",
        lk_zero_init = "lzi", lk_normal_init = "lni", dataset_chunk_size = "dcs", ["a/b_c/d_e"] = "d_e",
    } do
        t.eq(names.abbreviate(name), short)
    end
end)

t.test("numbers as Python writes them", function()
    for text, v in pairs {
        ["0.01"] = 1e-2, ["0.0001"] = 1e-4, ["1e-05"] = 1e-5, ["1.0"] = 1, ["0.1"] = 0.1,
            ["0.30000000000000004"] = 0.1 + 0.2, ["0.0"] = 0,
        ["-2.5"] = -2.5, ["1e+16"] = 1e16, ["1000000000000000.0"] = 1e15, ["123456.789"] = 123456.789,
        ["2.5e-07"] = 2.5e-7,
        ["0.003"] = 3e-3, ["5e-324"] = 5e-324, ["1.7976931348623157e+308"] = 1.7976931348623157e308, inf = math.huge,
    } do
        t.eq(names.python_float(v), text)
    end
end)

t.test("the README's command for Llama 3.1 8B", function()
    local p = names.paths(flags(), TRAINER)
    local first = "dl-d=distill_alpaca_clean_xent0_mse1000_lr1e-2-m=distill_llama3_1_8b_lk_smd_wtk64_fd64_w01" ..
                  "-f=finetune_lora_qkvo_alpaca_clean-s=0-se=0-re=0-lzi=1"
    local second = first .. "-bs=1-gas=8-nte=2-ms=-1-se=0-re=0"
    t.eq(p.distill, "./checkpoints/" .. M .. "/" .. first .. "_distill.pt")
    t.eq(p.finetune, "./checkpoints/" .. M .. "/" .. second .. "_ft.pt")
    t.eq(p.csv, "./results/" .. M .. "/" .. second .. "_ft.csv")
    t.eq(p.evaluation, "./checkpoints/" .. M .. "/" .. second .. "_final.pt")
    t.eq(names.periodic(p.finetune, 200), "./checkpoints/" .. M .. "/" .. second .. "_ft_200.pt")
    t.eq(names.parse(p.distill), { model = M, distill = D, finetune = F })
end)

t.test("with max_steps and replicate, as demo_8b.sh has it", function()
    local f = flags { max_steps = 2500, replicate = 100 }
    local p = names.paths(f, trainer(f))
    t.ok(p.distill:find("-s=0-ms=2500-se=0-re=100-lzi=1_distill.pt", 1, true), p.distill)
    t.ok(p.finetune:find("-lzi=1-bs=1-gas=8-nte=2-ms=2500-se=0-re=100_ft.pt", 1, true), p.finetune)
end)

t.test("the condensed name of a checkpoint", function()
    local p = names.paths(flags(), TRAINER)
    t.eq(names.condense(p.distill), "dacxmldl18lswfwflqac000_lzi=1_distill1d")
    local f = flags { load_distill_checkpoint = p.distill }
    t.eq(names.base(f), "dl-d=dacxmldl18lswfwflqac000_lzi=1_distill1d-m=" .. M .. "-f=" .. F .. "-s=0")
    t.eq(names.base(flags { load_distill_checkpoint = "default" }), names.base(flags()))
    f = flags { load_finetune_checkpoint = "a/b/x=one_two-y-z=three.pt" }
    t.ok(names.base(f):find("-f=" .. F .. "-s=0", 1, true)) -- the configuration wins
    f.finetune_config = nil
    t.ok(names.base(f):find("-f=ot_z=threet-s=0", 1, true), names.base(f))
    t.eq(names.condense "dl-d=a__b-m=c_d.pt", "_m=c_dcd") -- an empty part drops its piece
    f = flags { finetune_config = false }
    f.finetune_config = nil
    t.ok(names.base(f):find("-f=None-s=0", 1, true))
end)

t.test("a first stage that was loaded leaves no trace in the second name", function()
    local n = names.names(flags { load_distill_checkpoint = "default" }, nil)
    t.eq(n.finetune, n.distill .. "-se=0-re=0")
end)

t.test("every flag, in order", function()
    local f = flags {
        dataset = "x", lr = 1e-5, weight_decay = 0, optim = "sgd", scheduler = "cosine_warmup",
        dataset_chunk_size = 512, batch_size = 4,
        gradient_accumulation_steps = 2, num_train_epochs = 3, max_steps = 10, max_finetune_steps = 20, eval_steps = 5,
        max_eval_batches = 7,
        seed = 1, replicate = 2, attention_type = "lolcats_llama_window_sw", learned_kernel = "untied_head_einsum",
        tie_qk_kernels = true,
        train_qk = true, state_chunk_len = 256, no_peft_grad_ckpt = true, window_size = 32, lk_skip_connection = true,
        lk_normal_init = true,
        pretrained_model_name_or_path = "org/Some-Model", debug = true, no_attention_mask = true,
    }
    local n = names.names(f, trainer(f))
    t.eq(n.distill, "dl-d=" .. D .. "-m=" .. M .. "-f=" .. F .. "-npgc=1-s=1-debug-nam=1" ..
        "-ds=x-lr=1e-05-wd=0.0-o=sgd-sc=cosine_warmup-dcs=512-bs=4-gas=2-nte=3-ms=10-mfs=20-se=1-re=2" ..
        "-at=lolcats_llama_window_sw-lk=untied_head_einsum-tqk=1-tq=1-scl=256-npgc=1-ws=32-lsc=1-lzi=1-lni=1-pmnop=Some-Model")
    t.eq(n.finetune, n.distill .. "-ds=x-o=sgd-sc=cosine_warmup-dcs=512-bs=1-gas=2-nte=3-ms=20-mfs=20-se=1-re=2")
end)

t.test("the scripts for many GPUs", function()
    local f = {
        model_config = "llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01",
        distill_config = "llama3_1_70b/distill_rp_llama_70b_xent0_mse1000_lr1e-2",
        finetune_config = "llama3_1_70b/finetune_rp_llama_70b_qkvo",
        lk_zero_init = true, eval_steps = 50, dataset_chunk_size = 1024, fsdp_activation_checkpointing = true,
        checkpoint_dir = "ck",
    }
    local first = "dl-d=llama3_1_70b/distill_rp_llama_70b_xent0_mse1000_lr1e-2" ..
        "-m=llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01-f=llama3_1_70b/finetune_rp_llama_70b_qkvo" ..
        "-fac=1-dcs=1024-se=0-re=0-lzi=1"
    local p = names.paths(f, nil, { fsdp = true })
    t.eq(p.distill, "ck/" .. f.model_config .. "/distill-" .. first)
    t.eq(p.finetune, "ck/" .. f.model_config .. "/finetune-" .. first .. "-dcs=1024-se=0-re=0")
end)

t.test("both stages in one file: the published name of 405B", function()
    local f = {
        model_config = "llama3_1_405b/distill_llama3_1_405b_lk_smd_wtk64_fd64_w01",
        distill_config = "llama3_1_405b/rp_distill_llama_405b_xent1_mse1000_lr1e-2",
        finetune_config = "llama3_1_405b/rp_finetune_llama_40b_qv_hparams",
    }
    local n = names.names(f, nil)
    t.eq(names.combined(n, { final = "finetune_llama_405b_qkvo_e2_rp", step = 3550 }),
         "ckpt_lora-dl-d=rp_distill_llama_405b_xent1_mse1000_lr1e-2-m=distill_llama3_1_405b_lk_smd_wtk64_fd64_w01" ..
         "-f=rp_finetune_llama_40b_qv_hparams-s=0-se=0-re=0-ef=finetune_llama_405b_qkvo_e2_rp-ft_lora=0-se=0-re=0-s=3550.pt")
    n = names.names(f, nil, { fsdp = true })
    t.eq(names.combined(n), "ckpt_lora-" .. n.finetune:gsub("llama3_1_405b/", "") .. ".pt")
end)

t.test("blocks, and the harness", function()
    local run = "./checkpoints/dl-d=a-m=b-f=c-s=0-se=0-re=0"
    t.eq(names.block(run .. "_distill.pt", 0, 8, 126), run .. "-in=000-out=008_distill.pt")
    t.eq(names.block(run, 75, 79, 80), run .. "-in=75-out=79_distill.pt")
    t.eq(names.evaluation("piqa", 0), "d=piqa-ns=0")
    t.eq(names.evaluation("hendrycksTest", 5, { limit = 100, checkpoint = "x/y_ft.pt", replicate = 1 }),
         "d=hendrycksTest-ns=5-li=100.0-c=y_ft.pt-r=1")
end)

t.finish()
