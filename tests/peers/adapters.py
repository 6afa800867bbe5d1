"""adapters.py write FOLDER | check FOLDER: PEFT's own adapters, and what PEFT makes of ours.

write: a base model, and adapter folders as PEFT saves them, each with expected.safetensors (ids, logits in float64).
check: every folder of ours (ours_*/ with logits.safetensors) loaded by PEFT must give the same logits.
"""
import os
import sys
import warnings

sys.path.pop(0)  # a file beside this one has a package's name
import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config  # noqa: E402

warnings.filterwarnings("ignore")
BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)
MODELS = {"base": LlamaConfig(**BASE), "base_tied": LlamaConfig(**BASE, tie_word_embeddings=True), "base_qwen2": Qwen2Config(**BASE)}
CASES = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["o_proj", "up_proj"]),
    "regex": dict(r=3, lora_alpha=6, target_modules=r"model\.layers\.[12]\.(self_attn\.[qk]_proj|mlp\.down_proj)"),
    "all_linear": dict(r=2, lora_alpha=5, target_modules="all-linear"),
    "patterns": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"],
                     rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, alpha_pattern={"^model.layers.0.*k_proj": 3}),
    "layers": dict(r=4, lora_alpha=8, target_modules=["gate_proj", "v_proj"], layers_to_transform=[0, 2]),
    "exclude": dict(r=4, lora_alpha=8, target_modules=["gate_proj", "v_proj"], exclude_modules=["model.layers.1.mlp.gate_proj"]),
    "modules": dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
    "ends": dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "gaussian": dict(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
    "tied:modules": dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tied:ends": dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"]),
    "qwen2:bias_all": dict(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], bias="all"),
    "qwen2:bias_only": dict(r=4, lora_alpha=8, target_modules=["k_proj", "o_proj"], bias="lora_only"),
    "bin": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
}
REFUSED = {
    "dora": dict(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True),
    "lora_bias": dict(r=4, lora_alpha=8, target_modules=["q_proj"], lora_bias=True),
    "pissa": dict(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa"),
    "tokens": dict(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
}


def base_of(case):
    return "base_" + case.split(":")[0] if ":" in case else "base"


def load(folder, base):
    return AutoModelForCausalLM.from_pretrained(os.path.join(folder, base), attn_implementation="eager").eval()


def write(folder):
    torch.manual_seed(int(os.environ.get("SEED", "3")))
    for name, config in MODELS.items():
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.3 + (1.0 if p.dim() == 1 else 0.0)
        model.tie_weights()
        model.save_pretrained(os.path.join(folder, name))
    for case, options in list(CASES.items()) + list(REFUSED.items()):
        path = os.path.join(folder, ("refuse_" if case in REFUSED else "") + case.replace(":", "_"))
        base = base_of(case)
        model = get_peft_model(load(folder, base), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for key, p in model.named_parameters():
            if "lora_" in key or p.requires_grad:
                p.data = p.data + torch.randn_like(p) * 0.2
        model.save_pretrained(path, safe_serialization=case != "bin")
        if case == "bin" and not os.path.exists(os.path.join(path, "adapter_model.bin")):
            state = load_file(os.path.join(path, "adapter_model.safetensors"))
            torch.save(state, os.path.join(path, "adapter_model.bin"))
            os.remove(os.path.join(path, "adapter_model.safetensors"))
        with open(os.path.join(path, "base"), "w") as f:
            f.write(base)
        # what counts is what PEFT itself reads back
        if case not in REFUSED:
            model = PeftModel.from_pretrained(load(folder, base), path).double().eval()
            ids = torch.randint(0, 61, (2, 19))
            with torch.no_grad():
                save_file({"ids": ids.int(), "logits": model(ids).logits}, os.path.join(path, "expected.safetensors"))


def check(folder):
    bad = 0
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not name.startswith("ours_"):
            continue
        expected = load_file(os.path.join(path, "expected.safetensors"))
        base = open(os.path.join(path, "base")).read().strip()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(load(folder, base), path).double().eval()
        missing = [str(w.message)[:200] for w in seen if "missing" in str(w.message).lower()]
        with torch.no_grad():
            d = (model(expected["ids"].long()).logits - expected["logits"]).abs().max().item()
        ok = d < 1e-5 and not missing  # rotary tables and norms are float32 in there
        bad += not ok
        print("%s %s: differs by %.3g%s" % ("pass" if ok else "FAIL", name, d, " " + "; ".join(missing)))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    (write if sys.argv[1] == "write" else check)(sys.argv[2])
