# setup.sh: for the scripts that compare with Python's packages, which read it: program, work (a scratch folder) and python, an
# environment that has $packages. Skips (77) where there is no program, no python3, or no package index.
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
python=$peers/bin/python
if ! "$python" -c "import $(echo "$packages" | sed 's/ /, /g')" 2> /dev/null; then
    # shellcheck disable=SC2086
    "$python" -m pip install -q --disable-pip-version-check --retries 1 --timeout 20 $packages > "$peers/pip.log" 2>&1 ||
        skip "no package index ($(tail -1 "$peers/pip.log"))"
fi
work=${work:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work" || exit 1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
