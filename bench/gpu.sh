#!/usr/bin/env bash
# What a GPU has to say, in parts of under nine minutes each: bench/gpu.sh check | kernels [OP...] | mfu
#
#   check    ceilings, cuBLAS at the models' shapes, then `pytest -m gpu`
#   kernels  the best configuration of each kernel and whether `auto` may take it, newton_schulz against its bars, then
#            the benchmark suite; of these ops alone, if some are named
#   mfu      real training steps: eager, compiled and with kernels, each with a waterfall and its longest kernels by
#            name; attention, way by way
#
# The most valuable rows come first and every row is written when it is measured, so a part that is cut off leaves what
# it had. Results go to $OUT (default bench/results/gpu): at most eight files a part. $MINUTES (8.5) is the time that a
# part has. Needs torch, triton, pytest with pytest-benchmark and hypothesis, and nothing else: no network, no
# installation. A Liger wheel at bench/wheels/*.whl is used where it lies.
#
# mfu on an H200, as it was planned and never measured: of its 8.5 minutes some two and a quarter for each form that is
# compiled (compiling alone takes 60 to 90 s at depth 26) and one and a half for eager, all at 16 rows and in the order of
# their worth; what is left goes to vibechat with 32 rows, and at least the last 15% to attention. On an H100 eager is
# measured with 8 rows, if 16 do not fit.
#
# Where there is no GPU, all of it is a rehearsal: the same commands at tiny shapes, kernels in Triton's interpreter (real
# steps without any), results in a temporary directory. What it measures means nothing; that it ends well does.
set -uo pipefail
cd "$(dirname "$0")/.."
part="${1:-}"
case "$part" in check | kernels | mfu) shift ;; *) echo "usage: bench/gpu.sh check|kernels [OP...]|mfu" >&2; exit 2 ;; esac
python="$(command -v python3 || command -v python)"
gpu="$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')" || { echo "error: $python has no torch" >&2; exit 2; }
questions="-m gpu tests/gpu"
"$python" -c 'import xdist' >/dev/null 2>&1 && questions="-n 3 --dist worksteal $questions"  # a compiler is what they wait for
steps=(--depth "${DEPTH:-26}" --kernels "${KERNELS:-triton}" --common-batch-size 16)
if [ "$gpu" = 0 ]; then
    export OUT="${OUT:-$(mktemp -d)}"
    [ "$part" = mfu ] || export TRITON_INTERPRET=1
    questions="tests/interpreted/test_gpu_tests.py"
    steps=(--depth "${DEPTH:-1}" --kernels "${KERNELS:-auto}" --max-seq-len 64 --vocab-size 1000 --total-batch-size 256)
    steps+=(--device-batch-size 2 --rounds 1 --steps 2 --warmup 1)
    echo "no GPU: a rehearsal, into $OUT"
fi
export OUT="${OUT:-$PWD/bench/results/gpu}"
export VIBECHAT_BASE_DIR="${VIBECHAT_BASE_DIR:-$OUT/.base}"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
seconds="$(awk "BEGIN { print int(60 * ${MINUTES:-8.5}) }")"
mkdir -p "$OUT"
for wheel in bench/wheels/*.whl; do [ -e "$wheel" ] && export PYTHONPATH="$PWD/$wheel${PYTHONPATH:+:$PYTHONPATH}"; done
deadline=$((SECONDS + seconds))

# step NAME SHARE COMMAND...: run it in at most this share (per cent) of what is left of the time, its words to NAME.log
step() {
    local name="$1" left=$(((deadline - SECONDS) * $2 / 100))
    shift 2
    if [ "$left" -lt 15 ]; then echo "$name: no time left"; status=1; return; fi
    echo "== $name ($left s at most): $*"
    timeout --signal=INT --kill-after=10 "$left" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 40 "$OUT/$name.log"
    [ "$code" -eq 0 ] && return
    [ "$code" -ne 124 ] || echo "$name: its $left s were over"
    echo "$name: exit status $code"
    status=1
}

status=0
case "$part" in
check)
    step ceilings 50 "$python" -m bench.ceilings
    # shellcheck disable=SC2086  # options and a path, or a path
    step gpu-tests 100 "$python" -m pytest -p no:cacheprovider -q $questions
    ;;
kernels)
    names="$(IFS=' '; echo "$*")"
    step tune 55 "$python" -m bench.tune --out "$OUT" ${names:+--ops "$@"}
    case "$names" in "" | *newton_schulz*) step orthogonalization 40 "$python" -m bench.orthogonalization ;; esac
    step kernels 95 "$python" -m pytest -p no:cacheprovider -q bench/test_kernels.py --benchmark-only ${names:+-k "${names// / or }"}
    [ -e "$OUT/kernels.json" ] && "$python" -m bench.report "$OUT/kernels.json" >"$OUT/kernels.md"
    ;;
mfu)
    minutes="$(awk "BEGIN { print 0.7 * ${MINUTES:-8.5} }")"  # for what may still begin
    step mfu 85 "$python" -m bench.mfu "${steps[@]}" --minutes "$minutes" --kernels-by-name 15 \
        --only vibechat compiled eager fp8
    step attention 100 "$python" -m bench.attention
    ;;
esac
rm -rf "$OUT/.base"
exit "$status"
