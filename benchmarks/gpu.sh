#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one command, the most important first:
#
#     benchmarks/gpu.sh [FOLDER]          # FOLDER: docs/results/gpu
#
# Writes one JSON file a benchmark, the audits of seven configurations on the real GPU, a log of each in FOLDER/logs, and
# steps.json: every step with its exit status (124: its time was up) and seconds. A step that fails does not stop the
# others. Exit status: 0 if all steps ended well, else 1.
#
# PYTHON=python      the interpreter, with the package and jax[cuda13] installed
# MINUTES=25         when to begin no more steps; the one that runs is ended
# ALTGRAD=DIR        a checkout of the original AltGrad, to be among the peers
# TINY=1             shows that it runs, on a CPU too
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0" && exit 0; }
cd "$(dirname "$0")/.."
out=${1:-docs/results/gpu}
python=${PYTHON:-python}
deadline=$((SECONDS + 60 * ${MINUTES:-25}))
tiny=()
[ -z "${TINY:-}" ] || tiny=(--tiny)
kills=${TINY:+1}
kills=${kills:-5}
mkdir -p "$out/logs"
# One program is compiled, and its kernels are chosen by timing, once for all steps that run it.
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
steps=()
bad=0

step() { # NAME MINUTES ARGUMENTS...: runs python with the arguments, for so long at most
  local name=$1 limit=$((60 * $2)) left=$((deadline - SECONDS)) began=$SECONDS status=0
  shift 2
  if ((left <= 0)); then
    status=124
  else
    echo "== $name" >&2
    timeout -k 30 $((limit < left ? limit : left)) "$python" "$@" >"$out/logs/$name.log" 2>&1 || status=$?
  fi
  # An audit ends with 1 where products asked for in FP8 are not in FP8: that is what it found, and it is written.
  if ((status > 1)) || { ((status == 1)) && [[ $name != audit_* || ! -s $out/$name.json ]]; }; then
    bad=1
    echo "   $name: exit status $status, see $out/logs/$name.log" >&2
  fi
  steps+=("{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began))}")
  (IFS=, && echo "[${steps[*]}]") >"$out/steps.json"
}

audit() { # NAME CONFIG OPTIONS...: what the train step multiplies, as compiled for the GPU that is here
  local name=$1 config=$2
  shift 2
  rm -f "$out/audit_$name.json"
  step "audit_$name" 3 -m altgrad_jax.audit "--config=configs/$config" "--out=$out/audit_$name.json" "$@"
}

# shellcheck source=launch/xla_flags.sh
deterministic=$(source launch/xla_flags.sh auto deterministic && echo "${XLA_FLAGS:-}")
small=()
[ -z "${TINY:-}" ] || small=(--config.model.n_layer=1 --config.model.n_embd=64 --config.model.n_head=2
  --config.model.vocab_size=256 --config.model.block_size=32 --config.train.batch_size=4)

main=(bf16 hybrid e5m2 "e5m2, Pallas kernel")
step check 4 benchmarks/gpu_check.py "${tiny[@]}" --checks operands products kernel "--out=$out/check.json"
step gemm_large 4 benchmarks/gemm.py "${tiny[@]}" --minutes=2.5 "--out=$out/gemm_large.json" \
  --shapes 8192x16384x4096 8192x4096x4096 8192x8192x2048 8192x3072x768
step step_124M 5 benchmarks/gpu_step.py "${tiny[@]}" --minutes=4.5 --sizes gpt2_124M --recipes "${main[@]}" "--out=$out/step_124M.json"
step step_wide 4 benchmarks/gpu_step.py "${tiny[@]}" --minutes=3.5 --sizes wide_4096 --recipes "${main[@]}" "--out=$out/step_wide.json"
step step_30M 5 benchmarks/gpu_step.py "${tiny[@]}" --minutes=4.5 --sizes baseline_30M "--out=$out/step_30M.json"
audit hybrid hybrid.py "${small[@]}"
audit e5m2 e5m2.py "${small[@]}"
audit e5m2_pallas e5m2.py --config.precision.kernel=pallas "${small[@]}"
step peers 5 benchmarks/peers.py "${tiny[@]}" --minutes=4 --patience=120 ${ALTGRAD:+"--altgrad=$ALTGRAD"} "--out=$out/peers.json"
step losses 4 benchmarks/gpu_check.py "${tiny[@]}" --checks losses "--out=$out/losses.json"
# A run that is killed again and again ends with the bits of one that is not, if XLA is told to be deterministic; and
# what that costs, beside step_124M.
XLA_FLAGS=$deterministic step resume 4 benchmarks/resume.py --here --config=configs/hybrid.py:quick "--kills=$kills" \
  "--out=$out/resume.json"
XLA_FLAGS=$deterministic step step_deterministic 3 benchmarks/gpu_step.py "${tiny[@]}" --minutes=2.5 --sizes gpt2_124M --recipes bf16 hybrid \
  "--out=$out/step_deterministic.json"
step tiles 3 benchmarks/tune_kernel.py --config=configs/e5m2.py "--out=$out/tiles.json" "${small[@]}"
audit e5m2_tiles e5m2.py --config.precision.kernel=pallas "--config.precision.kernel_tiles=$out/tiles.json" "${small[@]}"
step layer_scan 4 benchmarks/layer_scan.py "${tiny[@]}" --layers 24 12 --recipes bf16 hybrid --width=768 --heads=12 --window=1024 \
  --vocabulary=50304 "--out=$out/layer_scan.json"
step sweep 4 benchmarks/sweep.py "${tiny[@]}" "--out=$out/sweep.json"
audit e4m3 format.py:e4m3 "${small[@]}"
audit e5m2_cast e5m2_cast.py "${small[@]}"
audit bf16 bf16.py "${small[@]}"
step step_more 8 benchmarks/gpu_step.py "${tiny[@]}" --minutes=7 --sizes gpt2_350M gpt_1.3B --recipes bf16 hybrid "e5m2, Pallas kernel" \
  "--out=$out/step_more.json"
step gemm 10 benchmarks/gemm.py "${tiny[@]}" --minutes=8 "--out=$out/gemm.json"
exit $bad
