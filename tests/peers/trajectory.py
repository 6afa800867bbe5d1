"""trajectory.py FOLDER [LIMIT]: what tests/peers/trajectory.lua trained, trained again in PyTorch: same weights, rows, order, start
and hyper-parameters, each update from what PyTorch itself made of the one before.

The model is transformers' and the adapters are PEFT's; of the method only the attention stands here, from its formulas, with masks
and quadratic: Hedgehog features, the teacher's softmax, the two terms of the window and linear parts under one normaliser. Prints for
each stage how far the loss curves are apart; fails where a step differs by more than LIMIT (0.005) of its loss.
"""
import json
import os
import statistics
import sys
import time

sys.path.pop(0)  # a file beside this one has a package's name
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AttentionInterface, AutoModelForCausalLM  # noqa: E402


class Maps(torch.nn.Module):
    """One layer's feature maps and window factors at their start: f of d features a head, the identity; sigmoid(-ln 9) = 0.1."""

    def __init__(self, heads, d, f):
        super().__init__()
        self.q = torch.nn.Parameter(torch.eye(d, f).repeat(heads, 1, 1))
        self.k = torch.nn.Parameter(torch.eye(d, f).repeat(heads, 1, 1))
        self.factors = torch.nn.Parameter(torch.full((1, heads, 1, 1), 1 / 9).log())

    @staticmethod
    def features(x, w):
        y = torch.einsum("hdf,bhtd->bhtf", w, x)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)


class Method:
    """The attention that transformers calls. In stage 1 ("transfer") the teacher's output goes on, and each layer's loss is learned at
    once; in stage 2 ("student") the student's does."""

    def __init__(self, settings):
        self.s, self.stage, self.maps, self.masks_of, self.losses, self.share = settings, "teacher", [], {}, [], 1.0

    def masks(self, t):
        if t not in self.masks_of:
            i, w = torch.arange(t), self.s["window"]
            first = (i // w - 1) * w if self.s["kind"] == "terrace" else i - w + 1  # of the keys in a query's window
            causal, inside = i[None, :] <= i[:, None], i[None, :] >= first[:, None]
            self.masks_of[t] = causal, causal & inside, causal & ~inside
        return self.masks_of[t]

    def softmax(self, q, k, v, scale):
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~self.masks(q.shape[2])[0], -torch.inf)
        return scores.softmax(-1) @ v

    def student(self, q, k, v, scale, maps):
        _, window, far = self.masks(q.shape[2])
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~window, -torch.inf)
        near = torch.sigmoid(maps.factors) * (scores - scores.amax(-1, keepdim=True)).exp()
        linear = (maps.features(q, maps.q) @ maps.features(k, maps.k).transpose(-1, -2)).masked_fill(~far, 0)
        both = near + linear
        return (both / both.sum(-1, keepdim=True)) @ v

    def __call__(self, module, q, k, v, mask, scaling, dropout=0.0, **_):
        n = q.shape[1] // k.shape[1]
        k, v, maps = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), self.maps[module.layer_idx]
        if self.stage == "student":
            y = self.student(q, k, v, scaling, maps)
        else:
            y = self.softmax(q, k, v, scaling)
            with torch.enable_grad():
                loss = 1000 * F.mse_loss(self.student(q, k, v, scaling, maps), y) / len(self.maps)
                (loss * self.share).backward()
            self.losses.append(loss.item())
        return y.transpose(1, 2).contiguous(), None


def in_double(model):
    """transformers rounds rotary tables and norms to float32 on the way; in float64 they are these."""
    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        d, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None].double() / theta ** (torch.arange(0, d, 2).double() / d)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    type(model.model.norm).forward, type(model.model.rotary_emb).forward = norm, rotary
    return model.double()


def check_start(folder, maps):
    """Their start must be ours, but for the rounding of a logarithm."""
    theirs = load_file(os.path.join(folder, "maps_start.safetensors"))
    for i, m in enumerate(maps):
        at = "model.layers.%d.self_attn." % i
        for name, p in (("feature_map_q.mlp.layer", m.q), ("feature_map_k.mlp.layer", m.k), ("window_factors", m.factors)):
            if (theirs[at + name].double() - p.detach().double()).abs().max() > 3e-7:
                sys.exit("FAIL  %s%s starts otherwise" % (at, name))


def distance(pairs):
    """Of what was trained: |theirs - ours| over |ours - where it started|."""
    apart = sum((a.double() - b.double()).pow(2).sum() for a, b, _ in pairs) ** 0.5
    return float(apart / sum((b.double() - c.double()).pow(2).sum() for _, b, c in pairs) ** 0.5)


def train(s, rows, params, lr, micro_step):
    """Losses and gradient norms, one an update."""
    optim = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    losses, norms, n = [], [], s["accumulate"]
    for at in range(0, len(rows["ids"]), n):
        losses.append(sum(micro_step(rows["ids"][j:j + 1].long(), rows["labels"][j:j + 1].long(), 1 / n)
                          for j in range(at, at + n)) / n)
        norms.append(float(torch.stack([p.grad.norm() for p in params]).norm()))
        optim.step()
        optim.zero_grad()
    return losses, norms


def report(folder, stage, losses, norms, apart, seconds, limit):
    with open(os.path.join(folder, stage, "metrics.jsonl")) as f:
        theirs = [x for x in map(json.loads, f) if "loss" in x]
    with open(os.path.join(folder, stage + "_torch.json"), "w") as f:
        json.dump({"losses": losses, "grad_norms": norms}, f)
    if len(theirs) != len(losses):
        sys.exit("FAIL  %s: %d updates there, %d here" % (stage, len(theirs), len(losses)))
    d = [abs(a["loss"] - b) / abs(b) for a, b in zip(theirs, losses)]
    g = [abs(a["grad_norm"] - b) / abs(b) for a, b in zip(theirs, norms)]
    ok = max(d) <= limit
    print("%s  %-8s %d updates: loss %.4f -> %.4f, PyTorch %.4f -> %.4f; they differ by at most %.2g (update %d), median %.2g; gradient "
          "norms by at most %.2g, median %.2g; what was trained by %.2g of its way; %.2f s an update in PyTorch" % (
              "pass" if ok else "FAIL", stage, len(losses), theirs[0]["loss"], theirs[-1]["loss"], losses[0], losses[-1],
              max(d), d.index(max(d)) + 1, statistics.median(d), max(g), statistics.median(g), apart, seconds / len(losses)), flush=True)
    return ok


def main(folder, limit):
    with open(os.path.join(folder, "settings.json")) as f:
        s = json.load(f)
    method = Method(s)
    AttentionInterface.register("lolcats", method)
    model = AutoModelForCausalLM.from_pretrained(os.path.join(folder, "model"), dtype=torch.float32, attn_implementation="lolcats")
    model = (in_double(model) if s["dtype"] == "f64" else model).eval().requires_grad_(False)
    c = model.config
    torch.set_default_dtype(model.dtype)
    method.maps = [Maps(c.num_attention_heads, c.head_dim, c.head_dim // 2) for _ in range(c.num_hidden_layers)]
    check_start(folder, method.maps)

    # 1. attention transfer
    def transfer(ids, labels, share):
        method.losses, method.share = [], share
        with torch.no_grad():
            model.model(ids, use_cache=False)
        return sum(method.losses)

    method.stage, t0 = "transfer", time.time()
    losses, norms = train(s, load_file(os.path.join(folder, "transfer_rows.safetensors")),
                          [p for m in method.maps for p in m.parameters()], s["transfer_lr"], transfer)
    start, end = (load_file(os.path.join(folder, "maps_%s.safetensors" % x)) for x in ("start", "end"))
    pairs = []
    for i, m in enumerate(method.maps):
        at = "model.layers.%d.self_attn." % i
        for name, p in (("feature_map_q.mlp.layer", m.q), ("feature_map_k.mlp.layer", m.k), ("window_factors", m.factors)):
            pairs.append((p.detach(), end[at + name], start[at + name]))
    ok = report(folder, "transfer", losses, norms, distance(pairs), time.time() - t0, limit)

    # 2. LoRA, on the maps that PyTorch trained
    for m in method.maps:
        m.requires_grad_(False)
    tuned = PeftModel.from_pretrained(model, os.path.join(folder, "adapter_start"), is_trainable=True).eval()
    params = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    if not all("lora_" in n for n in params):
        sys.exit("FAIL  PEFT trains more than the adapters: %s" % [n for n in params if "lora_" not in n])
    if s["dtype"] == "f64":
        tuned.double()

    def learn(ids, labels, share):
        if s["dtype"] == "f64":  # transformers' own loss rounds the logits to float32
            logits = tuned(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], labels[0, 1:])
        else:
            loss = tuned(input_ids=ids, labels=labels, use_cache=False).loss
        (loss * share).backward()
        return loss.item()

    method.stage, t0 = "student", time.time()
    losses, norms = train(s, load_file(os.path.join(folder, "lora_rows.safetensors")), list(params.values()), s["lora_lr"], learn)
    start, end = (load_file(os.path.join(folder, "adapter_%s" % x, "adapter_model.safetensors")) for x in ("start", "end"))
    pairs = [(p.detach(), end[n.replace(".default", "")], start[n.replace(".default", "")]) for n, p in params.items()]
    return report(folder, "lora", losses, norms, distance(pairs), time.time() - t0, limit) and ok


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.005) else 1)
