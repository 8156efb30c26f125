#!/usr/bin/env bash
# Collects in build/gpu, which git ignores, all files that check.sh and measure.sh need on a machine without a network.
#
#     benchmarks/gpu/prepare.sh PEER DATA [--smoke]
#
# PEER  checkout of build-nanogpt, whose train_gpt2.py is compared with restomod
# DATA  folder with corpus/*train*.jsonl.xz, eval/hellaswag_val.jsonl and tinyshakespeare/input.txt
#
# Variables: KIT, another folder than build/gpu, which is deleted first; WHEELS, folder of wheels to use instead of a
# download; PYTHON, the Python interpreter with restomod, which prepares the tokens.
set -euo pipefail

LIMIT=$((60 * 1024 * 1024)) # bytes in total, including the compiled code of check.sh
INDUCTOR=$((16 * 1024 * 1024))

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
(($# >= 2)) || { sed -n '2,/^set/{/^#/p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
PEER=$1 DATA=$2
[[ ${3:-} == --smoke ]] && export RESTOMOD_SMOKE=cpu
KIT=${KIT:-$root/build/gpu}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}"

for file in "$PEER/train_gpt2.py" "$DATA/eval/hellaswag_val.jsonl" "$DATA/tinyshakespeare/input.txt"; do
    [[ -f $file ]] || { echo "prepare.sh: $file does not exist" >&2; exit 2; }
done
[[ ! -e $KIT || -d $KIT/wheels ]] || { echo "prepare.sh: $KIT was not written by prepare.sh; choose another KIT" >&2; exit 2; }
rm -rf "$KIT"
mkdir -p "$KIT"/{wheels,build-nanogpt,data/eval,data/tinyshakespeare}

if [[ -n ${WHEELS:-} ]]; then
    cp "$WHEELS"/*.whl "$KIT/wheels"
else
    grep -v '^#' "$root/benchmarks/gpu/wheels.txt" | while read -r name; do grep -i "^$name==" "$root/constraints.txt"; done >"$KIT/wheels.txt"
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp --abi cp312 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
        -r "$KIT/wheels.txt" -d "$KIT/wheels"
    rm "$KIT/wheels.txt"
fi

cp "$PEER/train_gpt2.py" "$KIT/build-nanogpt/"
[[ -e $PEER/.git ]] && git -C "$PEER" rev-parse HEAD >"$KIT/build-nanogpt/REVISION"
cp "$DATA/eval/hellaswag_val.jsonl" "$KIT/data/eval/"
cp "$DATA/tinyshakespeare/input.txt" "$KIT/data/tinyshakespeare/"

text=$(mktemp -d)
trap 'rm -rf "$text"' EXIT
megabytes=66 # about 15 million tokens
[[ ${RESTOMOD_SMOKE:-} == cpu ]] && megabytes=0.3
"$PYTHON" -m benchmarks.gpu.corpus "$DATA" "$text/corpus.jsonl" --megabytes "$megabytes"
"$PYTHON" -m restomod prepare "$text/corpus.jsonl" --out "$KIT/data/tokens" --val-fraction 0.02 --workers 1

bytes=$(du -sb "$KIT" | cut -f1)
du -h --max-depth=2 "$KIT"
echo "$bytes bytes of at most $((LIMIT - INDUCTOR)); $INDUCTOR bytes are reserved for compiled code"
((bytes <= LIMIT - INDUCTOR)) || { echo "prepare.sh: too many bytes; use a smaller corpus" >&2; exit 1; }
cat <<END
next: copy the working tree with $KIT to the GPU machine and run there
    OUT=check REVISION=COMMIT benchmarks/gpu/check.sh        # at most 280 s
    OUT=measure REVISION=COMMIT benchmarks/gpu/measure.sh    # at most 420 s; first copy check/inductor.tgz to $KIT
then run on this machine
    python -m benchmarks.gpu.collect merge check/gpu.json measure/gpu.json && python -m benchmarks.readme
END
