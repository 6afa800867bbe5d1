"""parquet.py PROGRAM FOLDER [FILES] [SEED]: random parquet files of pyarrow (types, nesting, codecs, encodings, page sizes and versions)
read by lolcats and compared value by value; and text files against Python's json and csv."""
import csv
import decimal
import io
import json
import os
import random
import string
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

program, folder = sys.argv[1], sys.argv[2]
count, seed = int(sys.argv[3]) if len(sys.argv) > 3 else 80, int(sys.argv[4]) if len(sys.argv) > 4 else 1
os.makedirs(folder, exist_ok=True)
rnd = random.Random(seed)

READ = """local files = lc.files
for line in io.lines(os.getenv "LIST") do
    local ok, why = pcall(function()
        for record in require("lolcats.data").each { line } do io.write(files.to_json(record), "\\n") end
    end)
    if not ok then io.write("error ", tostring(why):gsub("\\n", " "), "\\n") end
    io.write("end\\n")
end"""

SCALARS = {"str": pa.string(), "large": pa.large_string(), "i32": pa.int32(), "i64": pa.int64(), "f32": pa.float32(), "f64": pa.float64(),
           "bool": pa.bool_(), "u8": pa.uint8(), "u32": pa.uint32(), "i8": pa.int8(), "i16": pa.int16(), "bytes": pa.binary(),
           "fixed": pa.binary(5), "decimal": pa.decimal128(12, 3), "half": pa.float16()}
ENCODINGS = {"i32": ["DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"], "i64": ["DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"],
             "i8": ["DELTA_BINARY_PACKED"], "i16": ["DELTA_BINARY_PACKED"], "u8": ["DELTA_BINARY_PACKED"],
             "str": ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"], "large": ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"],
             "bytes": ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"], "f32": ["BYTE_STREAM_SPLIT"], "f64": ["BYTE_STREAM_SPLIT"],
             "bool": ["RLE"], "fixed": ["DELTA_BYTE_ARRAY", "BYTE_STREAM_SPLIT"], "half": ["BYTE_STREAM_SPLIT"]}


def text():
    if rnd.random() < 0.2:
        return rnd.choice(["", "a", "hello", "日本語", "🙂"])
    return "".join(rnd.choice(string.printable[:95] + "äß漢🙂") for _ in range(rnd.choice([1, 3, 10, 50, 300])))


def a_type(depth=0):
    k = rnd.random()
    if depth < 3 and k < 0.18:
        return ("list", a_type(depth + 1), rnd.random() < 0.5)
    if depth < 3 and k < 0.32:
        return ("struct", [(f"f{i}", a_type(depth + 1), rnd.random() < 0.6) for i in range(rnd.randint(1, 3))])
    if depth < 2 and k < 0.36:
        return ("map", a_type(3))
    return (rnd.choice(list(SCALARS) + ["str"] * 4),)


def arrow(t):
    if t[0] == "list":
        return pa.list_(pa.field("element", arrow(t[1]), nullable=t[2]))
    if t[0] == "struct":
        return pa.struct([pa.field(n, arrow(x), nullable=null) for n, x, null in t[1]])
    return pa.map_(pa.string(), arrow(t[1])) if t[0] == "map" else SCALARS[t[0]]


def maybe(f, null):
    return None if null and rnd.random() < 0.25 else f()


def value(t, few):
    k = t[0]
    if k == "list":
        return [maybe(lambda: value(t[1], few), t[2]) for _ in range(rnd.choice([0, 0, 1, 2, 5]))]
    if k == "struct":
        return {n: maybe(lambda: value(x, few), null) for n, x, null in t[1]}
    if k == "map":
        return [(s, maybe(lambda: value(t[1], few), True)) for s in sorted({text() for _ in range(rnd.randint(0, 3))})]
    if k in ("str", "large"):
        return rnd.choice(["yes", "no", "a longer choice"]) if few else text()
    if k == "bool":
        return rnd.random() < (0.98 if few else 0.5)
    if k in ("bytes", "fixed"):
        return bytes(rnd.randint(32, 126) for _ in range(5 if k == "fixed" else rnd.randint(0, 9)))
    if k == "decimal":
        return decimal.Decimal(rnd.randint(-10**9, 10**9)).scaleb(-3)
    if k in ("f32", "f64", "half"):
        return {"f32": np.float32, "f64": float, "half": np.float16}[k](rnd.uniform(-9, 9))
    low, high = {"i32": (-2**31, 2**31 - 1), "i64": (-2**53, 2**53), "u8": (0, 255), "u32": (0, 2**32 - 1), "i8": (-128, 127),
                 "i16": (-2**15, 2**15 - 1)}[k]
    return rnd.randint(0, 3) if few else rnd.randint(low, high)


def plain(v, t):
    if v is None:
        return None
    if t[0] == "list":
        return [plain(x, t[1]) for x in v]
    if t[0] == "struct":
        return {n: plain(v[n], x) for n, x, _ in t[1]}
    if t[0] == "map":
        return [{"key": a, "value": plain(b, t[1])} for a, b in v]
    return v.decode() if isinstance(v, bytes) else float(v) if t[0] in ("decimal", "half", "f32") else v


def same(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, (int, float)) and isinstance(b, (int, float)) and abs(a - b) <= 1e-12 * max(1, abs(a))
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b and type(a) is type(b)


def encodings(path, t, out):
    if t[0] == "list":
        encodings(path + ".list.element", t[1], out)
    elif t[0] == "struct":
        for n, x, _ in t[1]:
            encodings(f"{path}.{n}", x, out)
    elif t[0] == "map":
        out[path + ".key_value.key"] = "PLAIN"
        encodings(path + ".key_value.value", t[1], out)
    else:
        out[path] = rnd.choice(ENCODINGS.get(t[0], []) + ["PLAIN"])
    return out


def parquet_file(path):
    columns = [(f"c{i}", a_type(), rnd.random() < 0.7) for i in range(rnd.randint(1, 5))]
    few = [rnd.random() < 0.5 for _ in columns]
    rows = [{n: maybe(lambda: value(t, f), null) for (n, t, null), f in zip(columns, few)} for _ in range(rnd.choice([0, 1, 7, 100, 1500]))]
    o = dict(compression=rnd.choice(["none", "snappy", "gzip", "zstd"]), version=rnd.choice(["1.0", "2.4", "2.6"]),
             data_page_version=rnd.choice(["1.0", "2.0"]), row_group_size=rnd.choice([3, 200, 10**6]), write_page_checksum=rnd.random() < 0.5,
             data_page_size=rnd.choice([50, 1000, 1 << 20]), store_schema=rnd.random() < 0.5)
    if rnd.random() < 0.5:
        o.update(use_dictionary=False, column_encoding={})
        for n, t, _ in columns:
            encodings(n, t, o["column_encoding"])
    schema = pa.schema([pa.field(n, arrow(t), nullable=null) for n, t, null in columns])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **o)
    return [{n: plain(r[n], t) for n, t, _ in columns} for r in rows], (columns, o)


def csv_file(path):
    names = [f"c{i}" for i in range(rnd.randint(1, 4))]
    alphabet = 'ab "",\n\r\n;\'äß漢 \t'
    rows = [{n: "".join(rnd.choice(alphabet) for _ in range(rnd.randint(0, 8))).replace("\r", "") for n in names} for _ in range(rnd.randint(0, 60))]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, quoting=rnd.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), lineterminator=rnd.choice(["\n", "\r\n"]))
    writer.writeheader()
    writer.writerows(rows)
    open(path, "w", encoding="utf-8", newline="").write(out.getvalue())
    return list(csv.DictReader(io.StringIO(out.getvalue(), newline=""))), names


def json_value(depth=0):
    k = rnd.random()
    if depth < 4 and k < 0.2:
        return [json_value(depth + 1) for _ in range(rnd.randint(0, 4))]
    if depth < 4 and k < 0.4:
        return {text(): json_value(depth + 1) for _ in range(rnd.randint(0, 4))}
    return rnd.choice([None, True, False, rnd.randint(-10**9, 10**9), rnd.uniform(-1e5, 1e5), text(), text()])


def json_file(path):
    rows = [{"v": json_value()} for _ in range(rnd.randint(1, 40))]
    lines = path.endswith("l")
    ascii_too = rnd.random() < 0.5
    with open(path, "w", encoding="utf-8", newline="") as f:
        if lines or rnd.random() < 0.5:
            f.write("\n".join(json.dumps(r, ensure_ascii=ascii_too) for r in rows))
        else:
            json.dump(rows, f, ensure_ascii=ascii_too, indent=rnd.choice([None, 2]))
    return rows, None


cases = []
for i in range(count):
    for ending, make in ((".parquet", parquet_file), (".csv", csv_file), (".json", json_file), (".jsonl", json_file)):
        path = f"{folder}/{i}{ending}"
        cases.append((path, *make(path)))
open(f"{folder}/list", "w").write("\n".join(path for path, _, _ in cases))
done = subprocess.run([program, "-e", READ], capture_output=True, text=True, env={**os.environ, "LIST": f"{folder}/list"})
assert done.returncode == 0, done.stderr
answers = done.stdout.split("end\n")
bad = 0
for (path, want, how), answer in zip(cases, answers):
    lines = answer.splitlines()
    got = None if lines and lines[-1].startswith("error ") else [json.loads(line) for line in lines]
    if got is None or not same(want, got):
        bad += 1
        print("differs:", path, how, (lines[-1] if got is None else [(a, b) for a, b in zip(want, got) if not same(a, b)][:1] or (len(want), len(got))))
print(f"{len(cases)} files read, {bad} differ")
sys.exit(1 if bad else 0)
