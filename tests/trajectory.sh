#!/bin/sh
# trajectory.sh [OPTION ..]: the loss curves of both stages on a real model against PyTorch (transformers, PEFT, and the method's
# attention from its formulas in tests/peers/trajectory.py): same weights, rows, order, start and hyper-parameters. Each update's loss
# must agree within 0.5 %. OPTION: of tests/peers/trajectory.lua, as --steps 10, --model NAME, --data FILE, --seed 1.
# Needs LOLCATS_PROGRAM (build/lolcats) and python3 with venv; packages and LOLCATS_PEERS as in python_peers.sh. A quarter of an hour
# on two idle cores. LOLCATS_TRAJECTORY=FOLDER keeps the files.
cd "$(dirname "$0")/.." || exit 1
program=${LOLCATS_PROGRAM:-build/lolcats}
peers=${LOLCATS_PEERS:-${LOLCATS_TEST_BUILD:-/tmp}/python_peers}

skip() {
    echo "skipped: $1"
    exit 77
}

[ -x "$program" ] || skip "$program is not there"
command -v python3 > /dev/null || skip "there is no python3"
if ! [ -x "$peers/bin/python" ]; then
    python3 -m venv "$peers" > /dev/null 2>&1 || skip "python3 -m venv does not work here"
fi
if ! "$peers/bin/python" -c "import torch, safetensors, transformers, peft" 2> /dev/null; then
    "$peers/bin/python" -m pip install -q --disable-pip-version-check --retries 1 --timeout 20 torch safetensors transformers peft \
        > "$peers/pip.log" 2>&1 || skip "no package index ($(tail -1 "$peers/pip.log"))"
fi
work=${LOLCATS_TRAJECTORY:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work" || exit 1
"$program" tests/peers/trajectory.lua "$work" "$@" > "$work/log" 2>&1 || {
    status=$?
    tail -30 "$work/log"
    exit $status
}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# PyTorch's threads sleep while they wait, and its large buffers are used again instead of being mapped anew in every step
OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
    "$peers/bin/python" tests/peers/trajectory.py "$work" 2> "$work/log"
status=$?
[ $status = 0 ] || tail -30 "$work/log"
exit $status
