# shellcheck shell=bash
# What setup.sh, run.sh and fetch.sh share. To be sourced, in the root of the repository.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then # it was run, not sourced
  echo "common.sh is what setup.sh, run.sh and fetch.sh share; each of them has --help"
  exit 0
fi

fail() {
  echo "error: $*" >&2
  exit 1
}

usage_error() {
  echo "error: $*" >&2
  exit 2
}

# Where the repository lies on the rented machine: absolute, or relative to the home folder there.
BOX_DIR=${BOX_DIR:-altgrad_jax}

# Sets `box` and `ssh` from [user@]host[:port]. Keys and aliases belong into ~/.ssh/config.
parse_box() {
  [[ $1 =~ ^([A-Za-z0-9_.@-]+)(:([0-9]+))?$ ]] || usage_error "'$1' is not [user@]host[:port]"
  box=${BASH_REMATCH[1]} ssh=(ssh)
  if [[ -n ${BASH_REMATCH[3]:-} ]]; then ssh+=(-p "${BASH_REMATCH[3]}"); fi
}

# Runs a command there, in the repository. On a terminal it has one there too, for W&B's login and Ctrl-C.
on_box() {
  local terminal=''
  if [[ -t 0 ]]; then terminal=-t; fi
  "${ssh[@]}" ${terminal:+"$terminal"} "$box" "cd $(printf %q "$BOX_DIR") && $(printf '%q ' "$@")"
}

# rsync needs itself at both ends, and says so only in a riddle.
check_rsync() {
  local status=0
  command -v rsync >/dev/null || fail "rsync is missing here: install it, e.g. apt-get install rsync"
  "${ssh[@]}" "$box" "command -v rsync" >/dev/null || status=$?
  if ((status == 255)); then fail "$box cannot be reached: check address, port and key with: ${ssh[*]} $box"; fi
  if ((status)); then fail "rsync is missing on $box: there, apt-get install rsync"; fi
}

# Copies this repository there, with what git would see of it; nothing there is deleted. The history goes along, for
# manifest.json names the revision, but not .git/config, which may hold a password, nor owners: git distrusts strangers.
upload() {
  check_rsync
  "${ssh[@]}" "$box" "mkdir -p $(printf %q "$BOX_DIR")"
  rsync -rlptz --filter=':- .gitignore' --exclude=/.git/config --exclude=/.git/hooks -e "${ssh[*]}" \
    ./ "$box:$BOX_DIR/" || fail "the upload to $box:$BOX_DIR failed"
}
