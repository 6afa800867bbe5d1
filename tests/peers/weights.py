"""weights.py write FOLDER [SEED] | check FOLDER: files of tensors as Python's packages write them, and what those read of ours.

write: random checkpoints of torch.save (zip and legacy, protocols 2 to 5, views, parameters, nested values), distributed
checkpoints of four processes, safetensors, GGUF; each with what is in it as want/NAME.safetensors.
check: lolcats tests/peers/weights.lua FOLDER has converted each to ours/NAME.{safetensors,pt,gguf}; safetensors, torch.load with
weights_only and gguf must read the same from them.
"""
import collections
import glob
import os
import random
import sys
import warnings

import gguf
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def some_tensor():
    dtype = random.choice(DTYPES)
    shape = [random.choice([0, 1, 1, 2, 3, 5, 7]) if random.random() < .9 else 33 for _ in range(random.randint(0, 5))]
    x = torch.randint(0, 2 if dtype is torch.bool else 200, shape).to(torch.float32).to(dtype)
    for _ in range(random.randint(0, 3)):
        kind = random.random()
        if x.dim() > 1 and kind < .3:
            x = x.permute(*random.sample(range(x.dim()), x.dim()))
        elif x.dim() > 0 and kind < .6:
            d = random.randrange(x.dim())
            start = random.randint(0, x.shape[d])
            x = x.narrow(d, start, random.randint(0, x.shape[d] - start))
        elif x.dim() > 0 and kind < .75:
            index = [slice(None)] * x.dim()
            index[random.randrange(x.dim())] = slice(None, None, 2)
            x = x[tuple(index)]
        elif kind < .85 and x.dim() < 5:
            x = x.unsqueeze(0).expand(random.randint(1, 3), *x.shape)
    return torch.nn.Parameter(x) if x.dtype.is_floating_point and x.dtype not in FLOAT8 and random.random() < .2 else x


def some_tree(depth):
    kind = random.random()
    if depth == 0 or kind < .5:
        return some_tensor()
    if kind < .7:
        return [some_tree(depth - 1) for _ in range(random.randint(0, 4))]
    if kind < .8:
        return tuple(some_tree(depth - 1) for _ in range(random.randint(0, 4)))
    if kind < .9:
        return collections.OrderedDict(("k%d\u00e9" % i, some_tree(depth - 1)) for i in range(random.randint(0, 5)))
    return {random.choice([i, "x%d" % i]): some_tree(depth - 1) for i in range(random.randint(0, 5))}


def flat(value, path, out):
    if isinstance(value, torch.Tensor):
        out[path] = value
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            flat(inner, "%s.%s" % (path, key) if path else str(key), out)
    return out


def plain(x):
    return x.detach().clone(memory_format=torch.contiguous_format)


def keep(folder, name, tensors):
    save_file({k: plain(v) for k, v in tensors.items()}, "%s/want/%s.safetensors" % (folder, name))


def write_checkpoints(folder):
    hows = [{}, {"_use_new_zipfile_serialization": False}] + [{"pickle_protocol": p} for p in (2, 3, 4, 5)]
    for i in range(60):
        tree = {"t%d" % j: some_tree(3) for j in range(random.randint(1, 12))}
        wanted = flat(tree, "", {})
        if not wanted:
            continue
        if random.random() < .3:
            tree = {"state_dict": tree, "step": random.randint(0, 2 ** 60), "s": "h\u00e9", "f": [1.5, None, True, -2 ** 70]}
        torch.save(tree, "%s/pt%d.pt" % (folder, i), **hows[i % len(hows)])
        keep(folder, "pt%d" % i, wanted)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), folder + "/module.pt")  # an OrderedDict with an attribute
    keep(folder, "module", module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    both = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(both, folder + "/training.pt")
    keep(folder, "training", flat(both, "", {}))


def write_shards(rank, count, folder, port):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    torch.manual_seed(0)
    full = {"w%d" % i: torch.randn(*s) for i, s in enumerate([(7, 5), (3,), (8, 4, 2), (2, 9), (1,), (0, 4), (300, 33)])}
    line, square = init_device_mesh("cpu", (count,)), init_device_mesh("cpu", (2, count // 2))
    places = [Shard(0), Shard(0), Shard(1), Shard(1), Replicate(), Shard(0), Shard(0)]
    dcp.save({"model": {k: distribute_tensor(v, line, [p]) for (k, v), p in zip(full.items(), places)}, "opt": {"lr": 0.5}},
             checkpoint_id=folder + "/line")
    two = {"a": distribute_tensor(full["w6"], square, [Shard(0), Shard(1)]), "b": distribute_tensor(full["w2"], square, [Shard(2), Shard(0)])}
    dcp.save(two, checkpoint_id=folder + "/square")
    if rank == 0:
        keep(folder, "line", full)
        keep(folder, "square", {"a": full["w6"], "b": full["w2"]})
    dist.destroy_process_group()


def write_gguf(folder):
    w = gguf.GGUFWriter(folder + "/blocks.gguf", "llama")
    w.add_array("x.words", ["a", "\u00e9"])
    w.add_float64("x.f", 0.1)
    wanted, x = {}, np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        type_ = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(x, type_)
        w.add_tensor(kind, data, raw_dtype=type_)
        wanted[kind] = torch.from_numpy(gguf.dequantize(data, type_).astype(np.float32).reshape(x.shape))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    keep(folder, "blocks", wanted)
    save_file({"x": torch.from_numpy(x), "n": torch.ones(7)}, folder + "/floats.safetensors", {"format": "pt", "about": "x\n\"y\""})
    keep(folder, "floats", {"x": torch.from_numpy(x), "n": torch.ones(7)})


def write(folder, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    os.makedirs(folder + "/want", exist_ok=True)
    write_checkpoints(folder)
    mp.spawn(write_shards, (4, folder, 20000 + os.getpid() % 20000), 4)
    write_gguf(folder)


def same(a, b):
    bits = lambda x: plain(x).reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def check_gguf(folder, problems):
    for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "bf16"):
        want = load_file(folder + "/want/floats.safetensors")
        for t in gguf.GGUFReader("%s/ours/floats.%s.gguf" % (folder, kind)).tensors:
            x = want[t.name].numpy()
            expected = gguf.quantize(x, t.tensor_type)
            if t.tensor_type.name.lower() != (kind if t.name == "x" or kind in ("f16", "bf16") else "f32"):
                problems.append("%s.%s is %s" % (kind, t.name, t.tensor_type.name))
            if not np.array_equal(expected.view(np.uint8).reshape(-1), np.asarray(t.data).view(np.uint8).reshape(-1)):
                problems.append("%s: the blocks of %s differ" % (kind, t.name))
    a, b = gguf.GGUFReader(folder + "/blocks.gguf"), gguf.GGUFReader(folder + "/ours/blocks.gguf")
    for x, y in zip(a.tensors, b.tensors):
        if x.name != y.name or x.tensor_type != y.tensor_type or not np.array_equal(x.data, y.data):
            problems.append("blocks.gguf: %s differs" % x.name)
    for key, field in a.fields.items():
        if not key.startswith("GGUF.") and field.contents() != b.fields[key].contents():
            problems.append("blocks.gguf: %s differs" % key)


def check(folder):
    problems, count = [], 0
    for path in sorted(glob.glob(folder + "/want/*.safetensors")):
        name = os.path.basename(path)[:-len(".safetensors")]
        want = load_file(path)
        ours = torch.load("%s/ours/%s.pt" % (folder, name), weights_only=True)
        for kind, got in (("safetensors", load_file("%s/ours/%s.safetensors" % (folder, name))), ("pt", ours.get("model_state_dict", ours))):
            count += 1
            if set(got) != set(want):
                problems.append("%s.%s: names differ: %s" % (name, kind, sorted(set(got) ^ set(want))[:5]))
            problems += ["%s.%s: %s differs" % (name, kind, k) for k in want if k in got and not same(got[k], want[k])]
    check_gguf(folder, problems)
    first, again = (open("%s/%s" % (folder, f), "rb").read() for f in ("floats.safetensors", "ours/floats.safetensors"))
    if sorted(first) != sorted(again):  # the order of its metadata is the library's accident
        problems.append("floats.safetensors is not written the same again")
    for p in problems[:20]:
        print("FAIL  " + p)
    print("%d files of ours read, %d problems" % (count, len(problems)))
    return 1 if problems or count < 50 else 0


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    else:
        sys.exit(check(sys.argv[2]))
