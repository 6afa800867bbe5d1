"""students.py write FOLDER [SEED] [CASES] | check FOLDER: the reference's checkpoints of random students, as PyTorch
writes them.

write: small random models, each linearized by a random configuration, with checkpoints of both stages in the forms that
the reference and its Hub releases have (wrapped or bare, three spellings of names, one file or two, in blocks,
distributed, old format, parameters), and the logits by the float64 reference in LOLCATS_TEST_DATA/reference.
check: what tests/peers/students.lua has written back from them.
"""

import collections
import json
import os
import random
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, os.path.join(os.environ.get("LOLCATS_TEST_DATA", "../shared"), "reference"))
import lolcats_reference as R  # noqa: E402
import st  # noqa: E402

warnings.filterwarnings("ignore")
PROJ = ["q_proj", "k_proj", "v_proj", "o_proj"]


def rnd(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).float().double()


def weights(c):
    H, I, V, d = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["head_dim"]
    q, k = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    w = {"model.embed_tokens.weight": rnd(V, H, scale=0.7), "model.norm.weight": 1 + rnd(H, scale=0.1)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows, cols in (
            ("self_attn.q_proj", q, H),
            ("self_attn.k_proj", k, H),
            ("self_attn.v_proj", k, H),
            ("self_attn.o_proj", H, q),
            ("mlp.gate_proj", I, H),
            ("mlp.up_proj", I, H),
            ("mlp.down_proj", H, I),
        ):
            w[p + name + ".weight"] = rnd(rows, cols, scale=1.3 * cols**-0.5)
        w[p + "input_layernorm.weight"], w[p + "post_attention_layernorm.weight"] = 1 + rnd(H, scale=0.1), 1 + rnd(
            H, scale=0.1
        )
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = rnd(V, H, scale=H**-0.5)
    return {k: v.float().double() for k, v in w.items()}


def some_model():
    h = random.choice([2, 4, 6])
    c = dict(
        vocab_size=random.choice([61, 96]),
        hidden_size=random.choice([32, 48]),
        intermediate_size=64,
        rms_norm_eps=1e-5,
        num_hidden_layers=random.choice([2, 3, 4]),
        num_attention_heads=h,
        num_key_value_heads=random.choice([g for g in (1, 2, h) if h % g == 0]),
        head_dim=random.choice([8, 16]),
        max_position_embeddings=256,
        rope_theta=random.choice([1e4, 5e5]),
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=random.random() < 0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    if random.random() < 0.3:
        c.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    elif random.random() < 0.5:
        c["rope_scaling"] = dict(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
            rope_type="llama3",
        )
    return c


def some_student(c):
    kind = random.choice(["terrace", "terrace", "sliding", "linear"])
    name = random.choice(["softmax_dim", "softmax_dim", "exp_dim", "relu", "pos_elu"])
    return dict(
        type=kind,
        window=None if kind == "linear" else random.choice([2, 4, 7]),
        map=name,
        bias=name == "relu" or random.random() < 0.2,
        fullspace=random.random() < 0.8,
        affine=kind != "linear" and random.random() < 0.3,
        f=random.choice([4, c["head_dim"]]),
        tied=random.random() < 0.15,
        train_factor=random.random() < 0.85,
        factor=round(random.uniform(-2.5, 1), 3),
    )


def yaml_of(s, model, c):
    kinds = {"terrace": "lolcats_llama_window_tk", "sliding": "lolcats_llama_window_sw", "linear": "lolcats_llama"}
    attention = dict(
        attention_type=kinds[s["type"]],
        feature_map=s["map"],
        feature_map_kwargs=dict(eps=1e-12, fullspace=s["fullspace"]),
        layer_idx=None,
        learned_kernel="untied_head_einsum",
        tie_qk_kernels=s["tied"],
        train_qk=False,
        learned_kernel_kwargs=dict(feature_dim=s["f"], skip_connection=False, bias=s["bias"], zero_init=False),
    )
    if s["type"] != "linear":
        attention.update(
            window_size=s["window"],
            affine_attention_factors=s["affine"],
            init_window_factor=s["factor"],
            train_window_factor=s["train_factor"],
            state_chunk_len=1024,
        )
    return json.dumps(
        dict(
            name="llama",
            attention=attention,
            model=dict(pretrained_model_name_or_path=model, torch_dtype="bfloat16", rope_theta=c["rope_theta"]),
        )
    )


def finetune_yaml(r, alpha, targets, train):
    f = dict(method="lora", kwargs=dict(r=r, lora_alpha=alpha, lora_dropout=0, target_modules=targets))
    if train:
        f["trainable_weights"] = ["feature_map_q.mlp.layer", "feature_map_k.mlp.layer", "window_factors"]
    return json.dumps(
        dict(
            dataset=dict(name="alpaca_clean", dataset_config=dict(chunk_size=64)),
            trainer=dict(name="default_lm"),
            finetune=f,
        )
    )


def save(x, path, names, form):
    """names: a function on the keys. form: dtype, wrapped, parameter, legacy, step, metric, distributed."""
    state = collections.OrderedDict()
    for k, v in x.items():
        v = v.to(form["dtype"])
        state[names(k)] = torch.nn.Parameter(v) if form.get("parameter") else v
    if form.get("distributed"):
        dcp.save({"model": state}, checkpoint_id=path, no_dist=True)
        return
    value = {"model_state_dict": state, "step": 10, form["metric"]: random.random()} if form["wrapped"] else state
    torch.save(value, path, _use_new_zipfile_serialization=not form.get("legacy"))


def case(folder, n):
    random.seed(n), torch.manual_seed(n)
    c, dtype = some_model(), random.choice([torch.float32, torch.bfloat16])
    s, dir, L = some_student(c), f"{folder}/case{n}", c["num_hidden_layers"]
    for sub in ("model_files", "configs/model", "configs/experiment", "checkpoints"):
        os.makedirs(f"{dir}/{sub}")
    w = weights(c)
    json.dump(c, open(f"{dir}/model_files/config.json", "w"))
    st.save(f"{dir}/model_files/model.safetensors", {k: v.float() for k, v in w.items()}, {"format": "pt"})
    h, d = c["num_attention_heads"], c["head_dim"]
    maps, fm = collections.OrderedDict(), []
    for i in range(L):
        pre, p = f"model.layers.{i}.self_attn.", {}
        if s["type"] != "linear":
            p["window_factors"] = torch.full((1, h, 1, 1), s["factor"])
            if s["train_factor"]:  # a buffer otherwise, which the reference does not save
                p["window_factors"] = rnd(1, h, 1, 1).to(dtype).double()
                maps[pre + "window_factors"] = p["window_factors"]
        for side in "qk":
            p[side] = (
                p["q"]
                if s["tied"] and side == "k"
                else {
                    "layer": rnd(h, d, s["f"], scale=0.5).to(dtype).double(),
                    "skip": False,
                    "bias": rnd(1, h, 1, 1).abs().to(dtype).double() if s["bias"] else None,
                }
            )
            if not (s["tied"] and side == "k"):
                maps[pre + f"feature_map_{side}.mlp.layer"] = p[side]["layer"]
                if s["bias"]:
                    maps[pre + f"feature_map_{side}.mlp.bias"] = p[side]["bias"]
        fm.append(p)
    r, targets = random.choice([2, 4, 8]), random.choice([PROJ, ["q_proj", "v_proj"], ["v_proj", "o_proj", "k_proj"]])
    alpha = random.choice([r, 2 * r, 3 * r])
    lora, flat = collections.OrderedDict(), {}
    for i in range(L):
        for proj in PROJ:
            if proj in targets:
                key = f"model.layers.{i}.self_attn.{proj}"
                out, inn = w[key + ".weight"].shape
                for ab, shape in (("A", (r, inn)), ("B", (out, r))):
                    x = rnd(*shape, scale=0.2).to(dtype).double()
                    lora[f"{key}.lora_{ab}.default.weight"], flat[f"{key}.lora_{ab}"] = x, x
    ids = torch.randint(3, c["vocab_size"], (2, 30))
    m = R.Llama(c, w, att=s, fm=fm)
    first = m.forward(ids, "student")[0]
    m.lora, m.ls = flat, alpha / r
    second = m.forward(ids, "student")[0]
    soft = R.Llama(c, w).forward(ids)[0]

    model, exp = f"student_{n}", f"finetune_{n}"
    if random.random() < 0.3:
        model, exp = "sub/" + model, "sub/" + exp
        os.makedirs(f"{dir}/configs/model/sub"), os.makedirs(f"{dir}/configs/experiment/sub")
    trains = random.random() < 0.25
    open(f"{dir}/configs/model/{model}.yaml", "w").write(yaml_of(s, "model_files", c))
    open(f"{dir}/configs/experiment/{exp}.yaml", "w").write(finetune_yaml(r, alpha, targets, trains))
    prefix = {
        "plain": lambda k: k,
        "model": lambda k: k.replace("model.", "model.model.", 1),
        "peft": lambda k: k.replace("model.", "base_model.model.model.", 1),
    }
    form = dict(
        dtype=dtype,
        wrapped=True,
        parameter=random.random() < 0.3,
        legacy=random.random() < 0.2,
        metric="distill/eval/loss",
    )
    stem = f"{dir}/checkpoints/dl-d=d-m={model.split('/')[-1]}-f={exp.split('/')[-1]}-s=0-se=0-re=0-lzi=1"
    kind = random.choice(["two files", "two files", "blocks", "one file", "hub", "distributed"])
    about = dict(kind=kind, alpha=alpha, r=r, targets=targets, model=model, exp=exp, student=s, files=[])

    def put(x, path, names, **more):
        save(x, path, prefix[names], dict(form, **more))
        about["files"].append(os.path.relpath(path, dir))

    ft = dict(lora)
    if trains:
        ft.update(maps)
    if kind == "blocks":
        cut = random.randint(1, L - 1)
        for a, b in ((0, cut - 1), (cut, L - 1)):
            part = {
                k.replace(f"layers.{i}.", f"layers.{i - a}."): v
                for i in range(a, b + 1)
                for k, v in maps.items()
                if f"layers.{i}." in k
            }
            put(part, f"{stem}-in={a}-out={b}_distill.pt", "plain")
        put(ft, f"{stem}_ft.pt", "peft", metric="eval/loss")
    elif kind == "one file":  # as the 70B and 405B conversion names it: both stages, PEFT's names, no wrapper
        put(
            {**maps, **lora},
            stem.replace("dl-d=", "ckpt_lora-dl-d=").replace("-lzi=1", "-s=3550") + ".pt",
            random.choice(["peft", "model"]),
            wrapped=False,
        )
    elif kind == "hub":
        both = random.random() < 0.5
        wrapped, names = random.random() < 0.5, random.choice(["plain", "model", "peft"])
        put({**maps, **lora} if both else maps, f"{dir}/checkpoints/model.pt", names, wrapped=wrapped)
        if not both:
            put(lora, f"{dir}/checkpoints/ft-model.pt", random.choice(["plain", "model", "peft"]), wrapped=wrapped)
    elif kind == "distributed":
        put(maps, f"{dir}/checkpoints/distill", "plain", distributed=True)
        put(ft, f"{dir}/checkpoints/finetune", random.choice(["plain", "peft"]), distributed=True)
    else:
        put(maps, f"{stem}_distill.pt", "plain")
        put(ft, f"{stem}-bs=1-gas=8-nte=2-ms=-1-se=0-re=0_ft.pt", "peft", metric="eval/loss")
    json.dump(about, open(f"{dir}/case.json", "w"))
    st.save(f"{dir}/expected.safetensors", {"ids": ids, "first": first, "second": second, "softmax": soft})
    torch.save({"maps": maps, "lora": lora}, f"{dir}/source.pt")


def check(folder):
    count = 0
    for name in sorted(os.listdir(folder)):
        dir = f"{folder}/{name}"
        if not os.path.exists(f"{dir}/source.pt"):
            continue
        source = torch.load(f"{dir}/source.pt")
        for stem in ("recipe", "export"):
            first, second = torch.load(f"{dir}/{stem}_distill.pt"), torch.load(f"{dir}/{stem}_ft.pt")
            assert {"model_state_dict", "step", "distill/eval/loss"} == set(first) and isinstance(
                first["distill/eval/loss"], float
            ), first.keys()
            assert {"model_state_dict", "step", "eval/loss"} == set(second) and isinstance(
                second["step"], int
            ), second.keys()
            maps, lora = first["model_state_dict"], {
                k.replace("base_model.model.", "", 1): v for k, v in second["model_state_dict"].items()
            }
            assert all(k.startswith("base_model.model.model.layers.") for k in second["model_state_dict"])
            want = {k: v for k, v in source["maps"].items()}
            extra = set(maps) - set(
                want
            )  # what the reference has as a buffer, or one tensor for both sides, may stand here too
            assert all("window_factors" in k or "feature_map_k" in k for k in extra), (name, stem, extra)
            for got, wanted in ((maps, want), (lora, source["lora"])):
                for k, v in wanted.items():
                    assert got[k].shape == v.shape and torch.equal(got[k].double(), v), (name, stem, k)
            assert set(lora) == set(source["lora"]), (name, stem, set(lora) ^ set(source["lora"]))
            if stem == "recipe":  # the order of named_parameters, too
                assert list(lora) == list(source["lora"]), (name, list(lora)[:4], list(source["lora"])[:4])
                assert [k for k in maps if k in want] == list(want), (name, list(maps)[:4], list(want)[:4])
            count += 1
    print(f"{count} pairs of files of ours are as PyTorch reads the originals")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        seed, n = (int(x) for x in (sys.argv[3:] + ["1", "24"][len(sys.argv) - 3 :])[:2])
        with torch.no_grad():
            for i in range(seed, seed + n):
                case(sys.argv[2], i)
    else:
        check(sys.argv[2])
