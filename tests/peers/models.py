"""models.py FOLDER [SEED] | --numbers: tiny random models of every family, written by transformers, with their logits in
float64; or rows of numbers for the test that needs no Python.

Each model gets a folder with config.json, model.safetensors and expected.safetensors: ids [2, t], logits [2, t, vocab]
of one forward, and logits.steps of a prefill followed by single steps with a cache. transformers rounds rotary tables,
norms and softmax to float32 on the way; its sources are loaded here with float64 in their place.
"""
import importlib.machinery
import os
import re
import sys

sys.path.pop(0)  # a file beside this one has a package's name
MODULES = ["transformers.modeling_rope_utils"] + [
    "transformers.models.%s.modeling_%s" % (m, m) for m in ("llama", "mistral", "qwen2", "qwen3")]
loader = importlib.machinery.SourceFileLoader
original = loader.get_code


def get_code(self, name):
    if name not in MODULES:
        return original(self, name)
    text = self.get_source(name)
    text = re.sub(r"torch\.float(32)?\b(?!\w)", "torch.float64", text).replace(".float()", ".double()")
    return compile(text, self.path, "exec")


loader.get_code = get_code

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

BASE = dict(vocab_size=91, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {
    "llama": (LlamaConfig, {}),
    "llama_biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama_head_dim": (LlamaConfig, dict(head_dim=12, rms_norm_eps=1e-5, rope_theta=5e5)),
    "llama_linear": (LlamaConfig, dict(rope_scaling=dict(rope_type="linear", factor=3.0))),
    "llama_dynamic": (LlamaConfig, dict(max_position_embeddings=20, rope_scaling=dict(rope_type="dynamic", factor=2.5))),
    "llama_dynamic_short": (LlamaConfig, dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "llama_llama3": (LlamaConfig, dict(rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16))),
    "llama_yarn": (LlamaConfig, dict(rope_scaling=YARN)),
    "llama_yarn_mscale": (LlamaConfig, dict(rope_scaling=dict(
        YARN, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0, truncate=False))),
    "llama_longrope": (LlamaConfig, dict(rope_scaling=dict(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=24, short_factor=[1.0, 1.1, 1.3, 1.5],
        long_factor=[1.0, 2.0, 3.0, 4.0]))),
    "mistral": (MistralConfig, dict(sliding_window=None)),
    "mistral_window": (MistralConfig, dict(sliding_window=7)),
    "mistral_window_2": (MistralConfig, dict(sliding_window=2, head_dim=10)),
    "qwen2": (Qwen2Config, {}),
    "qwen2_tied": (Qwen2Config, dict(tie_word_embeddings=True, rope_theta=1e6)),
    "qwen2_window": (Qwen2Config, dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen2_yarn": (Qwen2Config, dict(rope_scaling=YARN)),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "qwen3_biases": (Qwen3Config, dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "qwen3_window": (Qwen3Config, dict(head_dim=16, use_sliding_window=True, sliding_window=5, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])),
}


def make(folder, name, seed):
    kind, more = CASES[name]
    torch.manual_seed(seed)
    config = kind(**{**BASE, **more})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for key, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.2) + (1.0 if key.endswith("norm.weight") else 0.0)
    model.tie_weights()
    path = os.path.join(folder, name)
    model.save_pretrained(path)
    model = model.double()
    ids = torch.randint(3, config.vocab_size, (2, 41))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).double()
        prefill = 13
        out = model(ids[:, :prefill], use_cache=True)
        steps, cache = [out.logits], out.past_key_values
        for i in range(prefill, ids.shape[1]):
            out = model(ids[:, i:i + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
    save_file({"ids": ids.int(), "logits": whole, "logits.steps": torch.cat(steps, 1)},
              os.path.join(path, "expected.safetensors"))


def made_weight(name, shape):
    """The same weights from nothing, here and in tests/lua/test_families.lua."""
    h = 7
    for byte in name.encode():
        h = (h * 31 + byte) % 65521
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    v = ((i * i % 65521 * 31337 + i * 97 + h * 613) % 65536).double() / 65536 - 0.5
    return (v if len(shape) > 1 else v * 0.4 + (1 if name.endswith("norm.weight") else 0)).reshape(shape)


def print_numbers():
    """Lua rows for tests/lua/test_families.lua: config, and some logits of the last of 30 positions, whole and stepped."""
    import json
    import textwrap
    for name, (kind, more) in CASES.items():
        config = kind(**{**BASE, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4 if "head_dim" in more else 3,
                         "num_key_value_heads": 2 if "head_dim" in more else 1, **more})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().double()
        for key, p in model.named_parameters():
            p.data = made_weight(key, p.shape)
        model.tie_weights()
        ids = torch.tensor([[(7 * i * i + 3 * i + 5) % 91 for i in range(30)]])
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits[0, -1, :5]
            out = model(ids[:, :11], use_cache=True)
            for i in range(11, 30):
                out = model(ids[:, i:i + 1], past_key_values=out.past_key_values, use_cache=True)
        raw = json.loads(config.to_json_string(use_diff=False))
        keys = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
                "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
                "max_window_layers", "layer_types"]
        row = {k: raw[k] for k in keys if k in raw and not (k == "layer_types" and name != "qwen3_window")}
        text = "\n        ".join(textwrap.wrap(json.dumps(row), 108))
        print("    { name = \"%s\", config = [[\n        %s]],\n      whole = { %s },\n      stepped = { %s } }," % (
            name, text, ", ".join("%.10g" % x for x in whole), ", ".join("%.10g" % x for x in out.logits[0, -1, :5])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--numbers":
        print_numbers()
        sys.exit(0)
    for number, case in enumerate(CASES):
        make(sys.argv[1], case, int(sys.argv[2] if len(sys.argv) > 2 else 0) * 100 + number)
