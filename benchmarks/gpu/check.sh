#!/usr/bin/env bash
# First session on a GPU, at most 280 s: tests, variants of the training step, and a table of kernels.
#
#     OUT=results benchmarks/gpu/check.sh [--smoke]
#
# Writes $OUT/gpu.json, log.txt, kernels.txt and inductor.tgz (compiled code; copy it to build/gpu/ before measure.sh).
# Variables: see common.sh. Works without a network.
set -uo pipefail
LEFT=${LEFT:-280}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# three processes in parallel, as most of the time is compilation; measure.sh cannot reuse the compiled code
files=()
for subject in numerics training checkpoints memory evaluation distributed commands; do files+=("tests/cuda/test_$subject.py"); done
TORCHINDUCTOR_CACHE_DIR=$work/tests part tests 130 "$PYTHON" -m pytest "${files[@]}" -m cuda -n 3 --dist loadfile -q -rP \
    -p no:cacheprovider -o addopts= --timeout 75 --durations 6
part variants 140 "$PYTHON" -m benchmarks.gpu.variants --out "$work/variants.json" --kernels "$OUT/kernels.txt" \
    --seconds $(($(allowed 140) - 10)) "${smoke[@]}"
# without triton/, as fxgraph/ also has the compiled kernels
[[ -d $work/inductor ]] && tar czf "$OUT/inductor.tgz" -C "$work" --exclude=inductor/triton inductor
finish
