"""gguf_models.py FOLDER: the models that models.py wrote, as GGUF files in the manner of llama.cpp's converter (rows of q
and k in pairs for llama, own names), beside expected.safetensors, for tests/peers/models.lua."""
import json
import os
import shutil
import sys

sys.path.pop(0)  # a file beside this one has a package's name
import gguf  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
PART = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def name_of(name):
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return "blk.%s.%s.%s" % (layer, PART[module], kind)


def in_pairs(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def llama3_factors(c, s, d):
    out = []
    for i in range(d // 2):
        v = c["theta"] ** (-2 * i / d)
        length, old = 2 * np.pi / v, s["original_max_position_embeddings"]
        if length < old / s["high_freq_factor"]:
            out.append(1.0)
        elif length > old / s["low_freq_factor"]:
            out.append(s["factor"])
        else:
            part = (old / length - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            out.append(1 / ((1 - part) / s["factor"] + part))
    return np.array(out, dtype=np.float32)


def convert(source, target):
    c = json.load(open(source + "/config.json"))
    s = c.get("rope_parameters") or {}
    kind = s.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or s.get("mscale") or c["model_type"] == "mistral" and c.get("sliding_window") \
            or c.get("use_sliding_window"):
        return False
    arch = {"mistral": "llama"}.get(c["model_type"], c["model_type"])
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    d = c.get("head_dim") or c["hidden_size"] // heads
    os.makedirs(target, exist_ok=True)
    w = gguf.GGUFWriter(target + "/model.gguf", arch)
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(groups)
    w.add_key_length(d)
    w.add_value_length(d)
    w.add_rope_dimension_count(d)
    w.add_rope_freq_base(s.get("rope_theta", 10000.0))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(s["factor"])
    elif kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(s["factor"])
        w.add_rope_scaling_orig_ctx_len(s["original_max_position_embeddings"])
    elif kind == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors({"theta": s["rope_theta"]}, s, d))
    for name, x in load_file(source + "/model.safetensors").items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            x = in_pairs(x, heads if "q_proj" in name else groups)
        w.add_tensor(name_of(name), np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    shutil.copy(source + "/expected.safetensors", target)
    return True


if __name__ == "__main__":
    for case in sorted(os.listdir(sys.argv[1])):
        path = os.path.join(sys.argv[1], case)
        if os.path.exists(path + "/model.safetensors") and not case.endswith("_gguf"):
            convert(path, path + "_gguf")
