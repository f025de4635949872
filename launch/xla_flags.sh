# shellcheck shell=bash
# XLA's flags for a chip, each with its reason. To be sourced: it sets XLA_FLAGS of the shell that starts the program.
#
#   source launch/xla_flags.sh h100|h200|gpu|cpu|auto [deterministic] [triton]
#
# `gpu` is any other NVIDIA GPU; `auto` asks nvidia-smi. Flags that are in XLA_FLAGS already are kept and come last,
# where they win. XLA ends the process at a name that it does not know: tests/launch/test_xla_flags.py asks it.
# (No `set -e` here: it would close the terminal of whoever sources this by hand and mistypes a name.)

_altgrad_xla_flags() {
  local chip=${1:-auto} mode flags=() IFS=' '
  if (($#)); then shift; fi
  if [[ $chip == auto ]]; then
    # Without a GPU it may print its regrets where names are expected.
    chip=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) || chip=''
    case $chip in
      *H100*) chip=h100 ;;
      *H200*) chip=h200 ;;
      ?*) chip=gpu ;;
      *) chip=cpu ;;
    esac
  fi
  case $chip in
    h100 | h200)
      # The two differ in memory alone. The all-reduce of gradients is scheduled to overlap with the backward pass:
      # off by default, of use with several GPUs, without effect on one.
      flags+=(--xla_gpu_enable_latency_hiding_scheduler=true)
      ;;
    gpu | cpu) ;; # nothing has shown a need
    *)
      echo "error: xla_flags.sh: unknown chip '$chip': give h100, h200, gpu, cpu or auto" >&2
      return 2
      ;;
  esac
  for mode in "$@"; do
    case $mode in
      deterministic)
        # A resumed run ends with the same bits. XLA leaves out kernels that add in any order, and takes the first
        # choice of each matrix product instead of the fastest, since timing decides differently each time: slower.
        flags+=(--xla_gpu_deterministic_ops=true)
        ;;
      triton)
        # E5M2 x E5M2 on the 8-bit matrix units. cuBLASLt refuses the pair and XLA then multiplies in 16 bits, silently;
        # without cuBLAS to fall back on it must use its Triton kernels, and uses them for the 16-bit products as well.
        # For configs/e5m2.py. Needless for hybrid and e4m3, which cuBLASLt takes.
        flags+=(--xla_gpu_cublas_fallback=false)
        ;;
      *)
        echo "error: xla_flags.sh: unknown mode '$mode': give deterministic, triton or both" >&2
        return 2
        ;;
    esac
  done
  if [[ $chip != cpu && ${#flags[@]} -gt 0 ]]; then
    export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
  fi
}

if [[ ${1:-} == --help ]]; then
  sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
else
  _altgrad_xla_flags "$@"
fi
