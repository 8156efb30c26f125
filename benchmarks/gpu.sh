#!/usr/bin/env bash
# All that is worth measuring on one GPU of the H200's class, in at most 9 minutes. Nothing is downloaded; everything is
# written under $OUT: gpu.json, gpu.md, gpu.png, cuda.log.
#
#     OUT=results benchmarks/gpu.sh [--peer nanogpt=PATH ...] [--data DIR]
#     OUT=results benchmarks/gpu.sh --smoke     # on a CPU, tiny: does this very script work?
#
# PYTHON names the interpreter (default: .venv/bin/python if it is there, else python3).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${OUT:?name the folder of the results: OUT=results benchmarks/gpu.sh}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

device=cuda
for argument in "$@"; do
    [[ $argument == --smoke ]] && device=cpu
done
minutes=8

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline

# an item that finds no time left makes one round of its first case
items=step,loss,generation,hellaswag,checkpoint,loader,startup,growth,shakespeare
status=0
timeout --signal=INT --kill-after=10 $((60 * minutes + 50)) \
    "$PYTHON" -m benchmarks.run --device "$device" --minutes "$minutes" --only "$items" --out "$OUT" \
    "$@" 2>&1 | tee "$OUT/$device.log" || status=$?
[[ $status == 124 ]] && echo "the time was up; what was finished is in $OUT"
exit "$status"
