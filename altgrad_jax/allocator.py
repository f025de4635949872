"""Large pages for XLA's temporary arrays on a Linux CPU.

XLA:CPU asks for its temporaries anew at every step. glibc takes blocks that large straight from the kernel and returns
them after the step, so each step faults its memory in again, 4 KiB at a time. With 2 MiB pages and thresholds that keep
glibc from returning them, the same step is faster (`benchmarks/train_step.py` measures both; docs/LOG.md has figures).
glibc reads these settings when a process starts, so the process starts itself once more, under the same pid.
"""

import os
import platform
import sys

from altgrad_jax.interrupt import hold_back

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def restart_with_large_pages() -> None:
    """Replaces this process by itself with glibc's allocator set for large temporaries; call before heavy imports,
    and `interrupt.watch` after it.

    Does nothing outside glibc, or where GLIBC_TUNABLES is set already, to whatever value: the user has decided.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    # LAPACK's threads (the spectra's) would fight XLA's for the cores: several times as slow on two.
    one_thread = {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}
    hold_back()
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES} | one_thread)
