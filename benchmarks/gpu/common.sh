# Functions of check.sh and measure.sh, which source this file: environment, parts with time limits, collecting results.
#
# OUT     folder of the results: gpu.json, log.txt and at most four other files
# LEFT    time limit of the whole script in seconds (each script has a default)
# LEAST   minimum seconds for a part; with less time it is not started (default: 20)
# KIT     folder that prepare.sh has filled (default: build/gpu)
# PYTHON  Python interpreter (default: .venv/bin/python if it exists, otherwise python3)
# REVISION        measured commit, for a source tree without .git
# RESTOMOD_SMOKE  "cpu" for tiny sizes on a CPU, as --smoke

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${OUT:?set the folder of the results: OUT=results $0}"
mkdir -p "$OUT" || exit
OUT=$(cd "$OUT" && pwd)
KIT=$(cd "${KIT:-$root/build/gpu}" 2>/dev/null && pwd) || { echo "$0: no folder ${KIT:-build/gpu}; run prepare.sh first" >&2; exit 2; }
export KIT
cd "$root" || exit

smoke=()
[[ ${1:-} == --smoke ]] && export RESTOMOD_SMOKE=cpu
[[ ${RESTOMOD_SMOKE:-} == cpu ]] && smoke=(--smoke)
device=cuda
((${#smoke[@]})) && device=cpu

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi

LEAST=${LEAST:-20}
RESERVE=10 # seconds at the end for a part that stops late and for collecting results
failed=()
work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT

for wheel in "$KIT"/wheels/*.whl; do
    [[ -e $wheel ]] && "$PYTHON" -m zipfile -e "$wheel" "$work/site"
done
export PYTHONPATH="$work/site:$root/src:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
export TORCHINDUCTOR_CACHE_DIR=$work/inductor
# compiled code of an earlier session, valid only for the same GPU model and versions
[[ -f $KIT/inductor.tgz ]] && tar xzf "$KIT/inductor.tgz" -C "$work"

# allowed SECONDS: prints the smaller of SECONDS and the remaining time
allowed() {
    local left=$((LEFT - SECONDS - RESERVE))
    echo $(($1 < left ? $1 : left))
}

# part NAME SECONDS COMMAND...: runs a command that writes its results to $work/NAME.json or $work/NAME/, and adds the
# results, or the reason why they are missing, to $OUT/gpu.json. Always succeeds.
part() {
    local name=$1 limit log=$work/$1.log code began=$SECONDS
    limit=$(allowed "$2")
    shift 2
    if ((limit < LEAST)); then
        echo "=== $name: no time left" | tee -a "$OUT/log.txt"
        failed+=("$name")
        collect "$name" --missing "no time left"
        return
    fi
    echo "=== $name, at most $limit s, started after $SECONDS s" | tee -a "$OUT/log.txt"
    timeout --signal=INT --kill-after=8 "$limit" "$@" >"$log" 2>&1
    code=$?
    cat "$log" >>"$OUT/log.txt"
    tail -c 2000 "$log"
    echo "=== $name: exit code $code after $((SECONDS - began)) s" | tee -a "$OUT/log.txt"
    ((code)) && failed+=("$name")
    collect "$name" --exit-code "$code" --limit "$limit" --log "$log"
}

collect() {
    "$PYTHON" -m benchmarks.gpu.collect part "$1" --results "$work" --out "$OUT/gpu.json" "${@:2}" >>"$OUT/log.txt" 2>&1 ||
        { echo "=== $1: cannot collect the results:"; cat "$work/$1.json" "$work/$1"/*.json; } >>"$OUT/log.txt" 2>&1
    return 0
}

# item NAME SECONDS: runs one item of benchmarks.run
item() {
    local limit
    limit=$(allowed "$2")
    part "$1" "$limit" "$PYTHON" -m benchmarks.run --only "$1" --device "$device" --data "$KIT/data" --out "$work/$1" \
        --minutes "$(awk "BEGIN { print ($limit - 15) / 60 }")" "${smoke[@]}"
}

finish() {
    ls -l "$OUT"
    ((${#failed[@]})) && echo "not finished: ${failed[*]}"
    echo "done after $SECONDS s"
    exit $((${#failed[@]} > 0))
}

command -v nvidia-smi >/dev/null &&
    nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,power.limit --format=csv,noheader | tee "$OUT/log.txt"
