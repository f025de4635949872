#!/usr/bin/env bash
# Brings runs home from a rented machine, into runs/HOST/. May be run while they train, and again.
#
#   launch/fetch.sh root@203.0.113.7:22034 [RUN ...]      metrics, summaries, manifests, logs, W&B folders
#   --checkpoints   their checkpoints too (hundreds of MB each)
#   --to=DIR        another folder than runs/HOST
#
# BOX_DIR=... names the repository's folder on the machine. Nothing is deleted at either end.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,${/^#[^ ]/q;/^#/!q;s/^# \{0,1\}//p}' "$0" && exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

[[ $# -gt 0 && $1 != -* ]] || usage_error "say from where: launch/fetch.sh [user@]host[:port] [--checkpoints] [RUN ...]"
parse_box "$1"
shift
# One folder a machine: its runs may have names that runs here have too.
to=runs/${box#*@} checkpoints='' names=()
for argument in "$@"; do
  case $argument in
    --checkpoints) checkpoints=1 ;;
    --to=?*) to=${argument#*=} ;;
    -*) usage_error "unknown option $argument: fetch.sh takes --checkpoints and --to=DIR" ;;
    *) names+=("${argument#runs/}") ;;
  esac
done

check_rsync
rules=(--exclude=/.compiled "--exclude=/*.pid")
if [[ -z $checkpoints ]]; then rules+=(--exclude=/*/checkpoints --exclude=/*/damaged); fi
if ((${#names[@]})); then
  for name in "${names[@]}"; do rules+=("--include=/$name/***" "--include=/$name.log"); done
  rules+=("--exclude=*")
fi
mkdir -p "$to"
status=0
rsync -rltz --partial "${rules[@]}" -e "${ssh[*]}" "$box:$BOX_DIR/runs/" "$to/" || status=$?
# 24: a file went away meanwhile, as checkpoints do while a run trains.
((status == 0 || status == 24)) ||
  fail "not all could be fetched from $box:$BOX_DIR/runs: is it there? (BOX_DIR=... names the repository's folder)"
if ((${#names[@]})); then
  for name in "${names[@]}"; do
    [[ -d $to/$name ]] || fail "$box:$BOX_DIR/runs has no run $name"
  done
fi
echo "fetched into $to"
