"""Many conditions from one command: what they are, which run together, running them, and resuming.

    python -m altgrad_jax.sweep --config=configs/matrix.py:quick --workdir=runs/quick

matrix.py says which conditions there are, groups.py which of them one compiled program can run, lanes.py is that
program, group.py trains with it, worker.py does so in a process of its own, and __main__.py goes through them all.
"""
