#!/usr/bin/env bash
# What a GPU has to say, in parts of under nine minutes each: bench/gpu.sh check | kernels | mfu
#
#   check    ceilings, cuBLAS at the models' shapes, then `pytest -m gpu`
#   kernels  the best configuration of each kernel and whether `auto` may take it, then the benchmark suite
#   mfu      real training steps: eager, compiled and with kernels, each with a profile by op; attention, way by way
#
# The most valuable rows come first and every row is written when it is measured, so a part that is cut off leaves what
# it had. Results go to $OUT (default bench/results/gpu): at most eight files a part. Needs torch, triton, pytest and
# nothing else: no network, no installation. A Liger wheel at bench/wheels/*.whl is used where it lies.
set -uo pipefail
cd "$(dirname "$0")/.."
part="${1:-}"
case "$part" in check | kernels | mfu) ;; *) echo "usage: bench/gpu.sh check|kernels|mfu" >&2; exit 2 ;; esac
export OUT="${OUT:-$PWD/bench/results/gpu}"
export VIBECHAT_BASE_DIR="${VIBECHAT_BASE_DIR:-$OUT/.base}"
export TOKENIZERS_PARALLELISM=false
minutes="${MINUTES:-8.5}"
seconds="$(awk "BEGIN { print int(60 * $minutes) }")"
mkdir -p "$OUT"
for wheel in bench/wheels/*.whl; do [ -e "$wheel" ] && export PYTHONPATH="$PWD/$wheel${PYTHONPATH:+:$PYTHONPATH}"; done
deadline=$((SECONDS + seconds))

# step NAME COMMAND...: run it in what is left of the time, its words to NAME.log
step() {
    local name="$1" left=$((deadline - SECONDS))
    shift
    if [ "$left" -lt 15 ]; then echo "$name: no time left"; status=1; return; fi
    echo "== $name ($left s left): $*"
    timeout --signal=INT --kill-after=10 "$left" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 40 "$OUT/$name.log"
    [ "$code" -eq 0 ] || { echo "$name: exit status $code"; status=1; }
}

status=0
case "$part" in
check)
    step ceilings python -m bench.ceilings
    step gpu-tests python -m pytest -p no:cacheprovider -m gpu -q tests/gpu
    ;;
kernels)
    step tune python -m bench.tune --out "$OUT"
    step kernels python -m pytest -p no:cacheprovider bench/test_kernels.py --benchmark-only -q
    [ -e "$OUT/kernels.json" ] && python -m bench.report "$OUT/kernels.json" >"$OUT/kernels.md"
    ;;
mfu)
    step mfu python -m bench.mfu --depth "${DEPTH:-26}" --json
    step attention python -m bench.attention
    step profile python -m bench.step_profile --depth "${DEPTH:-26}"
    ;;
esac
rm -rf "$OUT/.base"
exit "$status"
