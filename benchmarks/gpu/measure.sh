#!/usr/bin/env bash
# Second session on a GPU, at most 420 s: the numbers of docs/benchmarks.md, most important first.
#
#     OUT=results benchmarks/gpu/measure.sh [--smoke]
#
# Writes $OUT/gpu.json, log.txt and shakespeare.jsonl (the metrics of the TinyShakespeare run). Variables: see common.sh.
# Works without a network.
set -uo pipefail
LEFT=${LEFT:-420}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

size=(--micro-batch 64 --warmup 2 --timed 5)
recipe=(--layers 12 --width 768 --context 1024 --batch-tokens 65536 --tokens 4915200 --lr 6e-4 --looks 8
    --eval-tokens 131072 --compile)
if ((${#smoke[@]})); then
    tiny=(--model.n-layer 2 --model.n-head 2 --model.n-embd 32 --sequence-length 32 --batch-tokens 128)
    size=("${tiny[@]}" --micro-batch 2 --warmup 1 --timed 2)
    recipe=(--layers 1 --width 64 --context 32 --batch-tokens 64 --tokens 512 --looks 2 --eval-tokens 64)
fi

# bench NAME SECONDS FLAGS...: runs `restomod bench step gpt2-124m` with 524,288 tokens per step; FLAGS override
bench() {
    part "$1" "$2" "$PYTHON" -m restomod bench step gpt2-124m --device "$device" "${size[@]}" --json "$work/$1.json" "${@:3}"
}

bench bench 150
part step 130 "$PYTHON" -m benchmarks.gpu.versus --peer "build-nanogpt=$KIT/build-nanogpt" --out "$work/step.json" \
    --seconds $(($(allowed 130) - 15)) "${smoke[@]}"
item shakespeare 140
[[ -f $work/shakespeare/shakespeare.jsonl ]] && cp "$work/shakespeare/shakespeare.jsonl" "$OUT"
part recipe 160 "$PYTHON" -m benchmarks.recipe "$KIT/data/tokens" --out "$work/recipe.json" --only gpt2,modern "${recipe[@]}"
item hellaswag 45
item generation 45
item checkpoint 45
bench bench-micro-32 60 --micro-batch $((${#smoke[@]} ? 1 : 32))
bench bench-micro-128 60 --micro-batch $((${#smoke[@]} ? 4 : 128))
bench bench-eager 45 --compile off
bench bench-residual-bf16 60 --residual-dtype bf16
finish
