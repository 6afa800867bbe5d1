-- reference_configs.lua: what the files under recipes/configs must hold, for test_configs.lua: one row a file, a row goes on where
-- a line is indented. A dash stands for a value that is not there.
return {
models = [[
model/base_llama3_1_8b meta-llama/Meta-Llama-3.1-8B /scr-ssd/mzhang/models/llama3 auto true flash_attention_2 500000
  - softmax
model/base_llama3_8b meta-llama/Meta-Llama-3-8B /scr-ssd/mzhang/models/llama3 auto true flash_attention_2 500000 -
  softmax
model/base_mistral_7b mistralai/Mistral-7B-v0.1 /scr-ssd/mzhang/models/mistral-7b-v0.1 auto true flash_attention_2
  10000 - softmax
model/chunked_experimental/distill_long_llama3_1_8b_lk_smd_wsw64_fd64_w01 meta-llama/Meta-Llama-3.1-8B
  /scr-ssd/mzhang/models/llama-3_1-8b auto true flash_attention_2 500000 rope_type lolcats_long_llama_window_sw 1024
  64 softmax_dim 64 false
model/chunked_experimental/distill_long_llama3_1_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3.1-8B
  /scr-ssd/mzhang/models/llama-3_1-8b auto true flash_attention_2 500000 rope_type lolcats_long_llama_window_tk 1024
  64 softmax_dim 64 false
model/chunked_experimental/distill_long_llama3_8b_lk_smd_wsw64_fd64_w01 meta-llama/Meta-Llama-3-8B
  /scr-ssd/mzhang/models/llama3 auto true flash_attention_2 500000 - lolcats_long_llama_window_sw 1024 64
  softmax_dim 64 false
model/chunked_experimental/distill_long_llama3_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3-8B
  /scr-ssd/mzhang/models/llama3 auto true flash_attention_2 500000 - lolcats_long_llama_window_tk 1024 64
  softmax_dim 64 false
model/chunked_experimental/distill_long_mistral_7b_lk_smd_wsw64_fd64_w01 mistralai/Mistral-7B-v0.1
  /scr-ssd/mzhang/models/mistral-7b-v0.1 auto true flash_attention_2 10000 - lolcats_long_llama_window_sw 512 64
  softmax_dim 64 false train_window_factor=true;train_attention_weights=false
model/chunked_experimental/distill_long_mistral_7b_lk_smd_wtk64_fd64_w01 mistralai/Mistral-7B-v0.1
  /scr-ssd/mzhang/models/mistral-7b-v0.1 auto true flash_attention_2 10000 - lolcats_long_llama_window_tk 512 64
  softmax_dim 64 false train_window_factor=true;train_attention_weights=false
model/distill_llama3_1_8b_lk_smd_fd64 meta-llama/Meta-Llama-3.1-8B /scr-ssd/mzhang/models/llama-3_1-8b auto true
  eager 500000 rope_type lolcats_llama - - softmax_dim 64 false
model/distill_llama3_1_8b_lk_smd_wsw64_fd64_w01 meta-llama/Meta-Llama-3.1-8B /scratch/ auto true eager 500000
  rope_type lolcats_llama_window_sw 1024 64 softmax_dim 64 false
model/distill_llama3_1_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3.1-8B /scratch/ auto true eager 500000
  rope_type lolcats_llama_window_tk 1024 64 softmax_dim 64 false
model/distill_llama3_1_8b_lk_t2r meta-llama/Meta-Llama-3.1-8B /scr-ssd/mzhang/models/llama-3_1-8b auto true eager
  500000 rope_type lolcats_llama - - relu 128 true
model/distill_llama3_8b_lk_smd_fd64 meta-llama/Meta-Llama-3-8B /scr-ssd/mzhang/models/llama3 auto true
  flash_attention_2 500000 - lolcats_llama - - softmax_dim 64 false
model/distill_llama3_8b_lk_smd_wsw64_fd64_w01 meta-llama/Meta-Llama-3-8B /scr-ssd/mzhang/models/llama3 auto true
  flash_attention_2 500000 - lolcats_llama_window_sw 1024 64 softmax_dim 64 false
model/distill_llama3_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3-8B /scr-ssd/mzhang/models/llama3 auto true
  flash_attention_2 500000 - lolcats_llama_window_tk 1024 64 softmax_dim 64 false
model/distill_llama3_8b_lk_t2r meta-llama/Meta-Llama-3-8B /scr-ssd/mzhang/models/llama3 auto true flash_attention_2
  500000 - lolcats_llama - - relu 128 true
model/distill_mistral_7b_lk_smd_fd64 mistralai/Mistral-7B-v0.1 /scr-ssd/mzhang/models/mistral-7b-v0.1 auto true
  flash_attention_2 10000 - lolcats_llama - - softmax_dim 64 false
model/distill_mistral_7b_lk_smd_wsw64_fd64_w01 mistralai/Mistral-7B-v0.1 /scr-ssd/mzhang/models/mistral-7b-v0.1 auto
  true flash_attention_2 10000 - lolcats_llama_window_sw 512 64 softmax_dim 64 false
  train_window_factor=true;train_attention_weights=false
model/distill_mistral_7b_lk_smd_wtk64_fd64_w01 mistralai/Mistral-7B-v0.1 /scr-ssd/mzhang/models/mistral-7b-v0.1 auto
  true flash_attention_2 10000 - lolcats_llama_window_tk 512 64 softmax_dim 64 false
  train_window_factor=true;train_attention_weights=false
model/distill_mistral_7b_lk_t2r mistralai/Mistral-7B-v0.1 /scr-ssd/mzhang/models/mistral-7b-v0.1 auto true
  flash_attention_2 10000 - lolcats_llama - - relu 128 true
model/base_llama3_1_70b meta-llama/Meta-Llama-3.1-70B /home/mzhang/models/llama-3_1-70b auto true sdpa 500000 type
  softmax
scaled/model/distill_llama3_1_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3.1-8B
  /data_persistent2/sim_data/llama-3_1-8b/ auto true eager 500000 rope_type lolcats_llama_window_tk 1024 64
  softmax_dim 64 false
model/llama3_1_405b/distill_llama3_1_405b_lk_smd_wtk64_fd64_w01 /data/sim/models/Meta-Llama-3.1-405B null null false
  flash_attention_2 500000 rope_type lolcats_llama_window_tk 1024 64 softmax_dim 64 false
model/llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3.1-70B
  /data/data_persistent2/sim_data/llama-3_1-70b/ auto true sdpa 500000 type lolcats_llama_window_tk 1024 64
  softmax_dim 64 false
model/llama3_1_8b/distill_llama3_1_8b_lk_smd_wtk64_fd64_w01 meta-llama/Meta-Llama-3.1-8B
  /data_persistent2/sim_data/llama-3_1-8b/ auto true eager 500000 rope_type lolcats_llama_window_tk 1024 64
  softmax_dim 64 false
model/llama3_1_8b/distill_llama_3_8b_lk_smd_wtk64_fd64_w01_attn4layers meta-llama/Meta-Llama-3-8B
  /data_persistent2/sim_data/llama-3_1-8b/ auto true flash_attention_2 500000 - lolcats_llama_window_tk 1024 64
  softmax_dim 64 false softmax_attentions=7,15,23,31
]],
data = [[
d1 alpaca_clean name=default path=yahma/alpaca-cleaned chunk_size=1024 concat_data=true cache_dir=data/alpaca
d2 alpaca_clean name=alpaca path=yahma/alpaca-cleaned chunk_size=1024 concat_data=true cache_dir=data/alpaca
d3 alpaca_clean name=default path=yahma/alpaca-cleaned chunk_size=1024 concat_data=true cache_dir=data/
d4 redpajama_sample train_data=redpajama/train.json[50000] eval_data=redpajama/train.json max_eval_num=1000
  max_length=32768 min_length=1024 chat_template=llama-3 chunk_size=1024 seed=42 cache_dir=data/rp
d5 redpajama_sample train_data=redpajama/train.json[50000] eval_data=redpajama/train.json num_train_samples=20000
  max_train_samples=40000 max_eval_num=1000 max_length=32768 min_length=1024 chat_template=llama-3 chunk_size=1024
  seed=42 cache_dir=data/rp use_c4=false
d6 redpajama_sample_contig train_data=redpajama/train.json[50000] eval_data=redpajama/train.json
  num_train_samples=10000 max_train_samples=40000 max_eval_num=1000 max_length=32768 min_length=2048
  chat_template=llama-3 chunk_size=2048 seed=42 cache_dir=data/rp load_from_cache_file=true
  esl_model_config=llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01 filter_by_esl=true
  dataloaders_dir=/home/simarora/code/lolcats/src/dataloaders
d7 redpajama_sample train_data=redpajama/train.json[50000] eval_data=redpajama/train.json max_eval_num=1000
  max_length=32768 min_length=1024 chat_template=llama-3 chunk_size=1024 seed=42 cache_dir=data/rp use_c4=false
d8 redpajama_sample_contig train_data=redpajama/train.json[50000] eval_data=redpajama/train.json
  num_train_samples=10000 max_train_samples=40000 max_eval_num=1000 max_length=32768 min_length=2048
  chat_template=llama-3 chunk_size=2048 seed=42 cache_dir=data/rp load_from_cache_file=true
  esl_model_config=llama3_1_70b/distill_llama3_1_70b_lk_smd_wtk64_fd64_w01 filter_by_esl=true
  dataloaders_dir=/home/simarora/code/lolcats/src/dataloaders/
d9 redpajama_sample train_data=redpajama/train.json[50000] eval_data=redpajama/train.json max_eval_num=1000
  max_length=32768 min_length=1024 chat_template=llama-3 chunk_size=2048 seed=42 cache_dir=data/rp use_c4=false
]],
tokenizers = [[
m1 pretrained_model_name_or_path=meta-llama/Meta-Llama-3-8B cache_dir=/scratch/
m2 pretrained_model_name_or_path=meta-llama/Meta-Llama-3.1-8B cache_dir=/data_persistent2/sim_data/llama-3_1-8b/
m3 pretrained_model_name_or_path=mistralai/Mistral-7B-v0.1 cache_dir=/scratch/
m4 pretrained_model_name_or_path=mistralai/Mistral-7B-v0.1 cache_dir=/data_persistent2/sim_data/
m5 pretrained_model_name_or_path=mistralai/Mistral-7B-v0.1 cache_dir=/scr-ssd/mzhang/models/mistral-v0.1
m6 pretrained_model_name_or_path=/data/sim/models/Meta-Llama-3.1-405B cache_dir=null
m7 pretrained_model_name_or_path=meta-llama/Meta-Llama-3.1-70B
  cache_dir=/data/data_persistent2/sim_data/llama-3_1-70b/
]],
experiments = [[
distill_alpaca_clean_xent0_mse1000_lr1e-2 | d1 m1 2 plateau - | optim=adamw_torch_fused lr=0.01 weight_decay=0.0 |
  name=distill_attention_xent_mse reverse_kl=false mse_factor=1000 xent_factor=0
distill_alpaca_clean_xent1_mse1000_lr1e-2 | d1 m2 2 plateau - | optim=adamw_torch_fused lr=0.01 weight_decay=0.0 |
  name=distill_attention_xent_mse reverse_kl=false mse_factor=1000 xent_factor=1
eval_alpaca_clean | d2 m3 2 plateau - | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 | name=finetune_seq2seq
  val_split=test greater_is_better=true metric_for_best_model=eval/rouge/geometric_mean | method=lora r=8
  lora_alpha=16 lora_dropout=0 target_modules=q_proj,k_proj,v_proj,o_proj
finetune_lora_fqkvo_alpaca_clean | d1 m4 2 plateau - | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm num_save_ckpt_steps=200 | method=lora r=8 lora_alpha=16 lora_dropout=0
  target_modules=q_proj,k_proj,v_proj,o_proj
  trainable_weights=feature_map_q.mlp.layer,feature_map_k.mlp.layer,window_factors
finetune_lora_qkvo_alpaca_clean | d1 m3 2 plateau - | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0 target_modules=q_proj,k_proj,v_proj,o_proj
no_distill_alpaca_clean | d2 m5 2 none - bare | optim=adamw_torch_fused lr=0.01 weight_decay=0.0 | name=null
llama3_1_405b/distill_alpaca_llama_405b_xent0_mse1000_lr1e-2 | d3 m6 2 plateau fsdp | optim=adamw_torch lr=0.01 |
  name=distill_attention_xent_mse mse_factor=1000 xent_factor=0 eval_steps=160
llama3_1_405b/distill_alpaca_llama_405b_xent1_mse1000_lr1e-2 | d3 m6 2 plateau - | optim=adamw_torch lr=0.01 |
  name=distill_attention_xent_mse mse_factor=1000 xent_factor=1 eval_steps=160
llama3_1_405b/finetune_alpaca_llama_405b | d1 m6 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0
  | name=default_lm num_train_epochs=3 gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4 lora_alpha=8
  lora_dropout=0.05 target_modules=q_proj,v_proj,k_proj,o_proj
llama3_1_405b/finetune_alpaca_llama_405b_qkvo | d1 m6 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm num_train_epochs=3 gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4
  lora_alpha=8 lora_dropout=0.05 target_modules=q_proj,v_proj,k_proj,o_proj
llama3_1_405b/finetune_alpaca_llama_405b_qkvo_e2 | d1 m6 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4 lora_alpha=8
  lora_dropout=0.05 target_modules=q_proj,v_proj,k_proj,o_proj
llama3_1_405b/finetune_rp_llama_405b_qkvo_e2 | d4 m6 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4 lora_alpha=8
  lora_dropout=0.05 target_modules=q_proj,k_proj,v_proj,o_proj
llama3_1_405b/no_distill_finetune_405b | d1 m6 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm num_train_epochs=3 gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4 lora_alpha=8
  lora_dropout=0.05 target_modules=q_proj,v_proj,k_proj,o_proj
  trainable_weights=feature_map_q.mlp.layer,feature_map_k.mlp.layer,window_factors
llama3_1_405b/no_distill_llama3_1_405b | d1 m6 2 none - | optim=adamw_torch_fused lr=0.01 weight_decay=0.0 |
  name=null eval_steps=160
llama3_1_405b/rp_distill_llama_405b_xent0_mse1000_lr1e-2 | d5 m6 8 plateau fsdp | optim=adamw_torch lr=0.01 |
  name=distill_attention_xent_mse mse_factor=1000 xent_factor=0 eval_steps=160
llama3_1_405b/rp_distill_llama_405b_xent1_mse1000_lr1e-2 | d5 m6 2 plateau fsdp | optim=adamw_torch lr=0.01 |
  name=distill_attention_xent_mse mse_factor=1000 xent_factor=1 eval_steps=160
llama3_1_405b/rp_finetune_llama_40b_qv_hparams | d5 m6 8 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0.05 target_modules=q_proj,v_proj
llama3_1_70b/distill_alpaca_llama_70b_xent0_mse1000_lr1e-2 | d3 m7 2 plateau fsdp | optim=adamw_torch lr=0.01 |
  name=distill_attention_xent_mse mse_factor=1000 xent_factor=0
llama3_1_70b/distill_rp2048_llama_70b_xent0_mse1000_lr1e-2 | d6 m7 2 plateau - | optim=adamw_torch_fused lr=0.01
  weight_decay=0.0 | name=distill_attention_xent_mse reverse_kl=false mse_factor=1000 xent_factor=0
llama3_1_70b/distill_rp_llama_70b_xent0_mse1000_lr1e-2 | d7 m7 2 plateau fsdp | optim=adamw_torch lr=0.01
  max_optimizer_steps=2500 | name=distill_attention_xent_mse mse_factor=1000 xent_factor=0
llama3_1_70b/finetune_alpaca_llama_70b_qkvo | d1 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0
  target_modules=q_proj,k_proj,v_proj,o_proj
llama3_1_70b/finetune_alpaca_llama_70b_qv | d1 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0.05 target_modules=q_proj,v_proj
llama3_1_70b/finetune_rp2048_llama70b_qv | d8 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0
  | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0.05 target_modules=q_proj,v_proj
llama3_1_70b/finetune_rp2048_llama_70b_qkvo | d6 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm gradient_accumulation_steps=2 eval_steps=5 | method=lora r=4 lora_alpha=8
  lora_dropout=0.05 target_modules=q_proj,k_proj,v_proj,o_proj
llama3_1_70b/finetune_rp_llama_70b_qkvo | d7 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0
  | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0 target_modules=q_proj,k_proj,v_proj,o_proj
llama3_1_70b/finetune_rp_llama_70b_qv | d7 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0.05 target_modules=q_proj,v_proj
llama3_1_70b/no_distill_baseline_distill_rp | d7 m7 2 none - | optim=adamw_torch_fused lr=0.01 weight_decay=0.0 |
  name=null
llama3_1_70b/no_distill_baseline_finetune_rp | d7 m7 2 plateau fsdp | optim=adamw_torch_fused lr=0.0001
  weight_decay=0.0 | name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0
  target_modules=q_proj,k_proj,v_proj,o_proj
  trainable_weights=feature_map_q.mlp.layer,feature_map_k.mlp.layer,window_factors
llama3_1_8b/distill_alpaca_clean_xent0_mse1000_lr1e-2 | d1 m2 2 plateau - | optim=adamw_torch_fused lr=0.01
  weight_decay=0.0 | name=distill_attention_xent_mse reverse_kl=false mse_factor=1000 xent_factor=0
llama3_1_8b/distill_rp_clean_xent0_mse1000_lr1e-2 | d7 m2 2 plateau - | optim=adamw_torch_fused lr=0.01
  weight_decay=0.0 | name=distill_attention_xent_mse reverse_kl=false mse_factor=1000 xent_factor=0 max_steps=2500
  max_eval_batches=500
llama3_1_8b/finetune_qkvo_alpaca_clean | d1 m2 2 plateau - | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm | method=lora r=8 lora_alpha=16 lora_dropout=0 target_modules=q_proj,k_proj,v_proj,o_proj
llama3_1_8b/finetune_qkvo_rp_clean | d9 m2 2 plateau - | optim=adamw_torch_fused lr=0.0001 weight_decay=0.0 |
  name=default_lm max_steps=2500 max_eval_batches=500 | method=lora r=8 lora_alpha=16 lora_dropout=0
  target_modules=q_proj,v_proj
]],
}
