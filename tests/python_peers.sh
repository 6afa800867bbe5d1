#!/bin/sh
# python_peers.sh [NAME ..]: our files against the Python packages that define them, both ways; NAME: weights, models, gguf_models,
# adapters, students, hub, parquet. The packages are installed into a scratch environment: LOLCATS_PEERS, or one beside the build; where there is
# no package index the test is skipped. Needs LOLCATS_PROGRAM (build/lolcats) and python3 with venv.
cd "$(dirname "$0")/.." || exit 1
program=${LOLCATS_PROGRAM:-build/lolcats}
peers=${LOLCATS_PEERS:-${LOLCATS_TEST_BUILD:-/tmp}/python_peers}
packages="torch numpy safetensors gguf transformers peft huggingface_hub pyarrow"
names=${*:-weights models gguf_models adapters students hub parquet}

skip() {
    echo "skipped: $1"
    exit 77
}

[ -x "$program" ] || skip "$program is not there"
command -v python3 > /dev/null || skip "there is no python3"
if ! [ -x "$peers/bin/python" ]; then
    python3 -m venv "$peers" > /dev/null 2>&1 || skip "python3 -m venv does not work here"
fi
python=$peers/bin/python
if ! "$python" -c "import torch, numpy, safetensors, gguf, transformers, peft, huggingface_hub, pyarrow" 2> /dev/null; then
    # shellcheck disable=SC2086
    "$python" -m pip install -q --disable-pip-version-check --retries 1 --timeout 20 $packages > "$peers/pip.log" 2>&1 ||
        skip "no package index ($(tail -1 "$peers/pip.log"))"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

weights() {
    "$python" tests/peers/weights.py write "$work/weights" && "$program" tests/peers/weights.lua "$work/weights" &&
        "$python" tests/peers/weights.py check "$work/weights"
}

models() {
    "$python" tests/peers/models.py "$work/models" && "$program" tests/peers/models.lua "$work/models"
}

gguf_models() {
    [ -d "$work/models" ] || "$python" tests/peers/models.py "$work/models" || return 1
    "$python" tests/peers/gguf_models.py "$work/models" && "$program" tests/peers/models.lua "$work/models"
}

adapters() {
    "$python" tests/peers/adapters.py write "$work/adapters" && "$program" tests/peers/adapters.lua "$work/adapters" &&
        "$python" tests/peers/adapters.py check "$work/adapters"
}

students() {
    shared=${LOLCATS_TEST_DATA:-../shared}
    [ -d "$shared/reference" ] || { echo "skipped: $shared/reference is not there"; return 0; }
    export LOLCATS_TEST_DATA="$shared"
    "$python" tests/peers/students.py write "$work/students" && "$program" tests/peers/students.lua "$work/students" &&
        "$python" tests/peers/students.py check "$work/students"
}

hub() {
    env -u HF_HUB_OFFLINE "$python" tests/peers/hub.py "$program" "$work/hub"
}

parquet() {
    "$python" tests/peers/parquet.py "$program" "$work/parquet"
}

failed=0
for name in $names; do
    if "$name" > "$work/log" 2>&1; then
        echo "pass  $name: $(tail -1 "$work/log")"
    else
        echo "FAIL  $name"
        tail -30 "$work/log"
        failed=1
    fi
done
exit $failed
