#!/bin/sh
# python_peers.sh [NAME ..]: our files against the Python packages that define them, both ways; NAME: weights, models, gguf_models,
# adapters, students, hub, parquet. The packages are installed into a scratch environment: LOLCATS_PEERS, or one beside the build; where there is
# no package index the test is skipped. Needs LOLCATS_PROGRAM (build/lolcats) and python3 with venv.
cd "$(dirname "$0")/.." || exit 1
packages="torch numpy safetensors gguf transformers peft huggingface_hub pyarrow"
names=${*:-weights models gguf_models adapters students hub parquet}
work=
. tests/peers/setup.sh

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
