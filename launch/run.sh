#!/usr/bin/env bash
# Trains on a rented machine in a session of its own, which outlives this terminal, and shows the log. Run it again to
# look on, or, if the run has ended, to resume it.
#
#   launch/run.sh --config=configs/hybrid.py [--workdir=runs/NAME] [--config.key=value ...]   on the machine
#   launch/run.sh root@203.0.113.7:22034 --config=configs/hybrid.py ...       from a laptop: uploads and installs first
#
# The corpus that the config asks for is prepared first, EUR-Lex downloaded unless it is there.
# Ctrl-C ends the looking on, not the run; that ends, with a checkpoint, by: kill $(cat runs/NAME.pid)
# XLA_MODES="deterministic triton" and CHIP=h100: see xla_flags.sh. BOX_DIR=...: see setup.sh.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,${/^#[^ ]/q;/^#/!q;s/^# \{0,1\}//p}' "$0" && exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

if [[ $# -gt 0 && $1 != -* ]]; then
  parse_box "$1"
  shift
  there=(env XLA_MODES="${XLA_MODES:-}" CHIP="${CHIP:-auto}" ${XLA_FLAGS:+XLA_FLAGS="$XLA_FLAGS"})
  upload
  on_box env ${PYTHON:+PYTHON="$PYTHON"} launch/setup.sh
  on_box "${there[@]}" launch/run.sh "$@"
  exit
fi

config='' workdir='' online='' settings=()
for argument in "$@"; do
  if [[ $argument =~ ^--(no)?config ]]; then settings+=("$argument"); fi
  case $argument in
    --config=*) config=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
    --config.tracking.wandb=*) online=${argument#*=} ;;
    --config | --workdir) usage_error "write $argument=VALUE, with an equals sign" ;;
  esac
done
[[ -n $config ]] || usage_error "--config=FILE is missing, e.g. launch/run.sh --config=configs/hybrid.py"
file=${config%%:*}
[[ -f $file || -f configs/$file.py ]] || usage_error "--config: there is no file $file in $PWD"
if [[ -z $workdir ]]; then # configs/format.py:e3m4,quick -> runs/format-e3m4-quick
  workdir=runs/$(basename "$file" .py)${config#"$file"}
  workdir=${workdir//[:,]/-}
fi
workdir=${workdir%/}
python=.venv/bin/python
[[ -x $python ]] || fail "there is no $python in $PWD: run launch/setup.sh first"
log=$workdir.log pid_file=$workdir.pid
mkdir -p "$(dirname "$workdir")"

# The name of the program too: after a restart of the machine the number may be another's.
pid=$(cat "$pid_file" 2>/dev/null || true)
if [[ -n $pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q altgrad_jax.main; then
  echo "$workdir is training already (pid $pid); its log:"
  trap 'exit 0' INT
  tail -n 20 -s 0.2 -f --pid="$pid" "$log"
  exit
fi

if [[ $online == online && -z ${WANDB_API_KEY:-} ]]; then
  "$python" -m wandb login || fail "no W&B login: run $python -m wandb login in a terminal here, or set WANDB_API_KEY"
fi

"$python" -m altgrad_jax.data prepare "${settings[@]}"

# shellcheck disable=SC2086 # modes are separate words
source launch/xla_flags.sh "${CHIP:-auto}" ${XLA_MODES:-}
touch "$log"
seen=$(wc -c <"$log")
if [[ " $* " != *" --config.runtime.compilation_cache="* ]]; then
  # A resumed run starts sooner, and with the kernels that XLA chose for it before.
  set -- "$@" --config.runtime.compilation_cache="$(dirname "$workdir")/.compiled"
fi
# A session of its own gets no SIGHUP when the connection breaks.
PYTHONUNBUFFERED=1 setsid "$python" -m altgrad_jax.main --workdir="$workdir" "$@" </dev/null >>"$log" 2>&1 &
pid=$!
echo "$pid" >"$pid_file"
echo "training in $workdir (pid $pid), log $log; XLA_FLAGS=${XLA_FLAGS:-}"
trap 'echo "the run goes on; stop it with: kill $pid"; exit 0' INT
tail -c "+$((seen + 1))" -s 0.2 -f --pid="$pid" "$log"
status=0
wait "$pid" || status=$?
rm -f "$pid_file"
case $status in
  130 | 143) echo "stopped with a checkpoint: the same command resumes" ;;
  137) echo "error: the run was killed, most likely for want of memory: the same command resumes" >&2 ;;
esac
exit "$status"
