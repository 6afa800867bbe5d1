-- reference_flags.lua: the command-line flags of the reference's training scripts, with their defaults, as rows of
-- lc.args; which of them are whole numbers, and which change nothing here.
local cli = require "lolcats.cli"
local log = require "lolcats.log"

local M = {}

-- name, kind (s: text, i: whole number, f: number, b: switch), default, help
local ROWS = {
    { "model_config", "s", cli.required, "model configuration, as under configs/model (or a .yaml file)" },
    { "distill_config", "s", nil, "experiment of the first stage: attention transfer" },
    { "finetune_config", "s", nil, "experiment of the second stage: LoRA" },
    { "eval_config", "s", nil, "experiment that scores generated answers at the end" },
    { "pretrained_model_name_or_path", "s", nil, "model instead of the configuration's" },
    { "load_distill_checkpoint", "s", nil, "skip the first stage and load this; default: what this run would write" },
    { "resume_distill", "b", nil, "train on from the loaded checkpoint" },
    { "load_finetune_checkpoint", "s", nil, "skip the second stage and load this" },
    { "resume_finetune", "b", nil, "train on from the loaded checkpoint" },
    { "attention_type", "s", nil, "attention instead of the configuration's" },
    { "learned_kernel", "s", nil, "kernel of the feature map" },
    { "lk_skip_connection", "b", nil, "kernel with a skip connection" },
    { "lk_zero_init", "b", nil, "kernel starts as the identity" },
    { "lk_normal_init", "b", nil, "kernel starts normally distributed" },
    { "tie_qk_kernels", "b", nil, "one feature map for queries and keys" },
    { "train_qk", "b", nil, "no effect, as in the reference" },
    { "state_chunk_len", "i", nil, "chunk of the long attentions" },
    { "window_size", "i", nil, "tokens that keep softmax attention" },
    { "lr", "f", nil, "learning rate of the first stage" },
    { "weight_decay", "f", nil, "weight decay of the first stage" },
    { "optim", "s", nil, "optimizer of both stages" },
    { "scheduler", "s", nil, "learning-rate schedule of both stages" },
    { "gradient_accumulation_steps", "i", nil, "micro-batches an update" },
    { "num_train_epochs", "i", nil, "passes over the data" },
    { "max_steps", "i", nil, "updates; -1: by epochs" },
    { "max_finetune_steps", "i", nil, "updates of the second stage" },
    { "no_peft_grad_ckpt", "b", nil, "only changes the name, as in the reference" },
    { "batch_size", "i", nil, "rows a micro-batch of the first stage" },
    { "num_workers", "i", nil, "no effect, as in the reference" },
    { "no_init_eval", "b", false, "no samples of text" },
    { "eval_steps", "i", nil, "updates between evaluations" },
    { "max_eval_batches", "i", nil, "rows that an evaluation looks at" },
    { "huggingface_token", "s", nil, "for gated models; better in HF_TOKEN" },
    { "checkpoint_dir", "s", "./checkpoints", "folder of checkpoints" },
    { "results_dir", "s", "./results", "folder of results" },
    { "replicate", "i", 0, "number of a repetition; part of the name" },
    { "seed", "i", 0, "order of rows and starts" },
    { "verbose", "b", nil, "print the configurations" },
    { "project_name", "s", "lolcats", "accepted; metrics are in the run folder" },
    { "wandb_entity", "s", "hazy-research", "accepted; metrics are in the run folder" },
    { "no_wandb", "b", nil, "accepted; nothing is sent anywhere" },
    { "debug", "b", nil, "only changes the name, as in the reference" },
    { "no_attention_mask", "b", nil, "only changes the name, as in the reference" },
    { "no_cuda", "b", nil, "no effect, as in the reference; see device" },
    -- the scripts for many GPUs
    { "dataset_chunk_size", "i", nil, "tokens a row" },
    { "finetune_lr", "f", nil, "learning rate of the second stage" },
    { "num_train_steps", "i", nil, "micro-batches after which a stage ends" },
    { "data_dir", "s", nil, "folder of data files" },
    { "layers_per_model", "i", nil, "layers a block: the first stage with the memory of one block" },
    { "layer_idx", "i", nil, "first layer of the block, in the scripts for blocks; here all blocks are done" },
    { "final_finetune_config", "s", nil, "experiment of the second stage after blocks; as finetune_config" },
    { "load_finetuned_loras", "b", nil, "accepted" }, { "checkpoint_model_config", "s", nil, "accepted" },
    { "shard_dir", "s", nil, "accepted; blocks are read from the model's own files" },
    { "attentions_data_dir", "s", nil, "folder of the blocks' inputs; without it beside the checkpoints" },
    { "enable_fsdp", "b", nil, "accepted; names become those of the scripts for many GPUs" },
    { "fsdp_activation_checkpointing", "b", nil, "gradient checkpointing in the second stage; part of the name" },
    { "low_cpu_fsdp", "b", nil, "accepted" }, { "pure_bf16", "b", nil, "accepted" },
    { "fsdp_cpu_offload", "b", nil, "accepted" },
    { "finetune_attn_mlps", "b", nil, "no effect, as in the reference" },
    { "layers_limit_max", "i", nil, "accepted" }, { "layers_limit_min", "i", nil, "accepted" },
    { "no_distill", "b", nil, "no first stage" },
    { "num_generations", "i", 1, "samples a prompt" }, { "top_k", "i", 50, "of samples" },
    { "top_p", "f", 0.95, "of samples" },
    { "max_new_tokens", "i", 100, "tokens a sample" },
    { "benchmark", "b", nil, "print tokens and seconds of samples" }, { "print_model", "b", nil, "print the model" },
}

local KIND = { s = "string", i = "number", f = "number", b = "boolean" }

--- The flags as rows for lc.args.
function M.rows()
    local out = {}
    for i, r in ipairs(ROWS) do out[i] = { r[1], r[3], r[4], type = KIND[r[2]] } end
    return out
end

local SILENT = { "num_workers", "train_qk", "no_cuda", "finetune_attn_mlps", "layers_limit_max", "layers_limit_min",
                 "low_cpu_fsdp", "pure_bf16",
                 "fsdp_cpu_offload", "layer_idx", "load_finetuned_loras", "checkpoint_model_config", "shard_dir" }

--- Checks what lc.args gave: whole numbers are whole; flags without effect are said. Returns the flags as a plain table
--- of what is set.
function M.check(args)
    local out = {}
    for _, r in ipairs(ROWS) do
        local v = args[r[1]]
        if v ~= nil then
            if r[2] == "i" and v % 1 ~= 0 then cli.usage("--%s takes a whole number, not %s", r[1], tostring(v)) end
            out[r[1]] = v
        end
    end
    for _, name in ipairs(SILENT) do
        if out[name] then log.say("--%s changes nothing here", name) end
    end
    if out.top_p == nil then out.top_p = 0.95 end
    return out
end

-- Flags by which distill.lua knows that it is called as the reference's script is.
local MARKS = { "model_config", "distill_config", "finetune_config", "eval_config", "pretrained_model_name_or_path" }

--- Does a command line name a configuration of the reference?
function M.wanted(argv)
    for _, word in ipairs(argv) do
        local name = word:match "^%-%-([%w_-]+)"
        if name then
            name = name:gsub("-", "_")
            for _, mark in ipairs(MARKS) do
                if name == mark or (#name > 4 and cli.suggest(name, { mark }) == mark and name:match "_config") then
                    return true
                end
            end
        end
    end
    return false
end

return M
