#!/usr/bin/env bash
# First call on a GPU, at most 280 s: is it right, and where does the time go? Then give the machine back and repair.
#
#     OUT=results benchmarks/gpu/check.sh [--smoke]
#
# Writes $OUT/gpu.json, log.txt, kernels.txt and inductor.tgz (compiled code: copy it to build/gpu/ before measure.sh).
# Variables: see common.sh. No network is needed.
set -uo pipefail
LEFT=${LEFT:-280}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# three at a time, each of which uses a part of the GPU and mostly compiles; what they compile is of no use to measure.sh
files=()
for subject in numerics training checkpoints memory evaluation distributed commands; do files+=("tests/cuda/test_$subject.py"); done
TORCHINDUCTOR_CACHE_DIR=$work/tests part tests 130 "$PYTHON" -m pytest "${files[@]}" -m cuda -n 3 --dist loadfile -q -rP \
    -p no:cacheprovider -o addopts= --timeout 75 --durations 6
part variants 140 "$PYTHON" -m benchmarks.gpu.variants --out "$work/variants.json" --kernels "$OUT/kernels.txt" \
    --seconds $(($(allowed 140) - 10)) "${smoke[@]}"
# without triton/: the compiled kernels lie in fxgraph/, too
[[ -d $work/inductor ]] && tar czf "$OUT/inductor.tgz" -C "$work" --exclude=inductor/triton inductor
finish
