#!/bin/sh
# trajectory.sh [OPTION ..]: the loss curves of both stages on a real model against PyTorch (transformers, PEFT, and the method's
# attention from its formulas in tests/peers/trajectory.py): same weights, rows, order, start and hyper-parameters. Each update's loss
# must agree within 0.5 %. OPTION: of tests/peers/trajectory.lua, as --steps 10, --model NAME, --data FILE, --seed 1.
# Needs LOLCATS_PROGRAM (build/lolcats) and python3 with venv; packages and LOLCATS_PEERS as in python_peers.sh. A quarter of an hour
# on two idle cores. LOLCATS_TRAJECTORY=FOLDER keeps the files.
cd "$(dirname "$0")/.." || exit 1
packages="torch safetensors transformers peft"
work=${LOLCATS_TRAJECTORY:-}
. tests/peers/setup.sh
"$program" tests/peers/trajectory.lua "$work" "$@" > "$work/log" 2>&1 || {
    status=$?
    tail -30 "$work/log"
    exit $status
}
# PyTorch's threads sleep while they wait, and its large buffers are used again instead of being mapped anew in every step
OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
    "$python" tests/peers/trajectory.py "$work" 2> "$work/log"
status=$?
[ $status = 0 ] || tail -30 "$work/log"
exit $status
