#!/usr/bin/env bash
# Prepares a machine with an NVIDIA GPU: checks it, installs into .venv, and sees that JAX finds the GPU.
#
#   launch/setup.sh [--eurlex]                            on the machine, in its copy of this repository
#   launch/setup.sh root@203.0.113.7:22034 [--eurlex]     from a laptop: uploads the repository first
#
# --eurlex also prepares EUR-Lex for the full-size configs; without it run.sh does, before it trains.
# PYTHON=... names the interpreter to make .venv of, BOX_DIR=... the folder on the machine. May be run again.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,${/^#[^ ]/q;/^#/!q;s/^# \{0,1\}//p}' "$0" && exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

NEEDED_GB=12 # CUDA's libraries, unpacked, beside their archives; and room for a few checkpoints

if [[ $# -gt 0 && $1 != -* ]]; then
  parse_box "$1"
  shift
  upload
  on_box env ${PYTHON:+PYTHON="$PYTHON"} launch/setup.sh "$@"
  exit
fi

eurlex=
for argument in "$@"; do
  case $argument in
    --eurlex) eurlex=1 ;;
    *) usage_error "unknown option $argument: setup.sh takes --eurlex" ;;
  esac
done

# The GPU and its driver decide which of JAX's CUDA builds can run.
command -v nvidia-smi >/dev/null || fail "no nvidia-smi: this machine has no NVIDIA driver; rent one with a GPU"
gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader 2>&1) ||
  fail "nvidia-smi does not work: ${gpus%%$'\n'*}"
oldest=999
while IFS=, read -r driver capability name; do
  name=${name# } capability=${capability# }
  echo "GPU: $name, compute capability $capability, driver $driver"
  if ((${capability/./} < oldest)); then oldest=${capability/./}; fi
done <<<"$gpus"
driver=${gpus%%.*}
if ((driver >= 580 && oldest >= 75)); then # CUDA 13 has dropped what came before Turing
  cuda=cuda13
elif ((driver >= 525)); then
  cuda=cuda12
else
  fail "NVIDIA driver $driver is too old: 525 or later is needed (580 for CUDA 13); rent a machine with a newer one"
fi
if ((oldest < 89)); then
  echo "note: no FP8 matrix units below compute capability 8.9: FP8 recipes are emulated here, slower than BF16"
fi

# 3.11 first: constraints.txt was tested with it.
python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -z $python && -z ${PYTHON:-} ]] && command -v uv >/dev/null; then
  uv python install --quiet 3.11 && python=$(uv python find 3.11)
fi
[[ -n $python ]] ||
  fail "Python 3.11 or later is needed, and ${PYTHON:-python3} is not: install one and give PYTHON=..."

if [[ ! -x .venv/bin/python ]]; then
  free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  ((free >= NEEDED_GB)) ||
    fail "$free GB free in $PWD, $NEEDED_GB GB needed: use a larger disk, or BOX_DIR=... on another"
  "$python" -m venv .venv || {
    rm -rf .venv # or the next call would take the half of it for the whole
    fail "$python cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv"
  }
fi
echo "installing .[$cuda] into .venv (minutes, the first time)"
.venv/bin/python -m pip install --quiet --no-cache-dir -e ".[$cuda]" -c constraints.txt ||
  fail "pip could not install .[$cuda]: its reason is above"

source launch/xla_flags.sh auto # so that a flag which this jaxlib does not know shows now
export XLA_PYTHON_CLIENT_PREALLOCATE=false # to see the GPU takes none of its memory, for a run may be training
.venv/bin/python -c 'import jax; print("JAX", jax.__version__, "sees", jax.devices("gpu"))' ||
  fail "JAX does not see the GPU${LD_LIBRARY_PATH:+; LD_LIBRARY_PATH is set, which hides the CUDA of .venv: unset it}"

if [[ -n $eurlex ]]; then
  .venv/bin/python -m altgrad_jax.data prepare --name=eurlex ||
    fail "EUR-Lex could not be prepared: the reason is above"
fi
echo "ready: launch/run.sh --config=configs/hybrid.py"
