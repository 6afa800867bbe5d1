"""hub.py PROGRAM FOLDER: the Hub's cache shared with huggingface_hub, against the server of tests/lua/hub_server.lua: what we fetched
it finds without asking, what it fetched we find; a download that it left is ours to lock; the token stays with its host."""
import os
import subprocess
import sys
import time

program, folder = os.path.abspath(sys.argv[1]), sys.argv[2]
os.makedirs(folder, exist_ok=True)
server = subprocess.Popen([program, "tests/lua/hub_server.lua", folder])
for _ in range(200):
    if os.path.exists(f"{folder}/port"):
        break
    time.sleep(0.05)
endpoint = "http://127.0.0.1:" + open(f"{folder}/port").read()
os.environ.update(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=f"{folder}/ours")
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)

NAMES = ("config.json", "model.safetensors", "tokenizer.json")


def lolcats(code, **env):
    done = subprocess.run([program, "-e", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log():
    return open(f"{folder}/log").readlines()


def ours_then_theirs():
    ours = lolcats('print(lc.hub.model("org/good", {quiet = true}))')
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

    for name in NAMES:
        path = hf_hub_download("org/good", name, local_files_only=True)
        assert path == f"{ours}/{name}" and os.path.islink(path), path
        assert try_to_load_from_cache("org/good", name) == path
    assert snapshot_download("org/good", local_files_only=True) == ours
    scan = scan_cache_dir()
    assert not scan.warnings and [(r.repo_id, r.nb_files) for r in scan.repos] == [("org/good", 3)], scan
    mark = len(log())
    hf_hub_download("org/good", "model.safetensors")
    assert [line.split()[0] for line in log()[mark:]] == ["HEAD"], log()[mark:]  # asked about, not fetched again


def theirs_then_ours():
    code = "from huggingface_hub import hf_hub_download\n" + "".join(f"hf_hub_download('org/good', '{n}')\n" for n in NAMES)
    code += "hf_hub_download('org/data', 'data/test.jsonl', repo_type='dataset')\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HOME": f"{folder}/theirs"})
    mark = len(log())
    found = lolcats('print(lc.hub.model("org/good", {quiet = true}))', HF_HOME=f"{folder}/theirs")
    assert sorted(os.listdir(found)) == sorted(NAMES)
    assert [line.split()[0] for line in log()[mark:]] == ["GET"], log()[mark:]  # the list of files alone
    mark = len(log())
    again = lolcats('print(lc.hub.model("org/good"))', HF_HOME=f"{folder}/theirs", HF_HUB_OFFLINE="1")
    path = lolcats('print(lc.hub.file("org/data", "data/test.jsonl", {type = "dataset"}))', HF_HOME=f"{folder}/theirs", HF_HUB_OFFLINE="1")
    assert again == found and open(path).read() == '{"text": "held"}\n' and len(log()) == mark


def one_lock():
    """A lock that filelock holds keeps us waiting, and we go on when it is given back."""
    from filelock import FileLock

    home = f"{folder}/locked"
    etag = os.path.basename(os.path.realpath(f"{folder}/ours/hub/models--org--good/snapshots/{'c0ffee' * 6}c0ff/model.safetensors"))
    path = f"{home}/hub/.locks/models--org--good/{etag}.lock"
    os.makedirs(os.path.dirname(path))
    with FileLock(path):
        child = subprocess.Popen([program, "-e", 'print(lc.hub.model("org/good"))'], env={**os.environ, "HF_HOME": home},
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(1.5)
        assert child.poll() is None
        assert not os.path.exists(f"{home}/hub/models--org--good/blobs/{etag}")
    out, err = child.communicate(timeout=20)
    assert child.returncode == 0 and "waiting for another process" in err, err


try:
    ours_then_theirs()
    theirs_then_ours()
    one_lock()
    assert not any("host=localhost token=h" in line for line in log())
    print("the cache is shared both ways")
finally:
    server.terminate()
