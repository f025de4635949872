"""The train step of the same GPT in other libraries, side by side in one run.

    python benchmarks/peers.py [--size=gpt2_124M] [--batch=8] [--altgrad=DIR] [--out=FILE.json]
    python benchmarks/peers.py --tiny          # shows that it runs; on a CPU too

Peers (`peer_steps.py`): altgrad_jax in BF16 and in the hybrid recipe; a plain PyTorch GPT through torch.compile in
BF16, and with torchao's float8 layers; a flax.linen GPT in BF16, with flax's own fp8_ops, and quantised by qwix; the
original AltGrad trainer's step, where --altgrad names a checkout. Whole steps on random tokens: forward, backward,
clipping, AdamW. Only altgrad_jax quantises the output layer, so it is also there without (`differs` names such things).

Every peer is a process that keeps its program ready; they take steps in turn, `rounds` times over, and wait while it is
another's turn. A time is the median over rounds of a turn divided by its steps; `speed_over_ours`, the speed over
altgrad_jax's in BF16, is the median over rounds of the ratio in the same round. A peer that is not installed or does
not run is in the results with the reason.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from common import RESULT, failed, machine_of_workers, save_results, say, skipped, worker_environment
from gpt_sizes import SIZES, config_of, throughput
from peer_steps import PEERS
from timing import speed_over

TURN_SECONDS, MOST_STEPS = 0.5, 20
# All peers are on the device at once, so none may take its whole memory.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    """Starts the peers one after the other, then lets them take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="gpt2_124M", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--altgrad", metavar="DIR", help="a checkout of the original AltGrad")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=240, help="seconds that a peer may take to get ready")
    parser.add_argument("--minutes", type=float, default=0, help="start no peer after so many; 0: no limit")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, for tests")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.size = "tiny"
    if arguments.worker:
        work(arguments)
        return
    of = machine_of_workers()
    entries: dict[str, Any] = {}
    ready: dict[str, Worker] = {}
    began = time.monotonic()
    try:
        for name in arguments.peers:
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                entries[name] = skipped(f"not begun within --minutes={arguments.minutes:g}")
                continue
            worker = Worker(name, arguments)
            entries[name] = worker.started(arguments.patience)
            if "ready" in entries[name]:
                del entries[name]["ready"]
                ready[name] = worker
        take_turns(ready, entries, arguments, of["accelerator"]["kind"])
    finally:
        for worker in ready.values():
            worker.end()
    results = {"size": arguments.size, "batch": arguments.batch, "rounds": arguments.rounds, "peers": entries}
    save_results(arguments.out, results, of)
    print(json.dumps(results, indent=2))


def take_turns(
    ready: dict[str, "Worker"], entries: dict[str, Any], arguments: argparse.Namespace, device_kind: str
) -> None:
    """Runs all rounds and enters what was found; a peer that dies in one is left out of the others."""
    config = config_of(arguments.size, "bf16", arguments.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(arguments.rounds):
        for name, worker in list(ready.items()):
            answer = worker.turn(arguments.patience)
            if "seconds" in answer:
                seconds[name].append(answer["seconds"])
            else:
                entries[name] |= answer
                ready.pop(name).end()
    base = next(iter(PEERS))  # ours, in BF16
    for name, worker in ready.items():
        median = statistics.median(seconds[name])
        timed = {"seconds_per_step": round(median, 6), "all_rounds": [round(s, 6) for s in seconds[name]]}
        entries[name] |= timed | throughput(config, median, device_kind) | {"peak_bytes": worker.peak_bytes}
        if base in ready:
            entries[name]["speed_over_ours"] = round(speed_over(seconds[base], seconds[name]), 4)


class Worker:
    """A peer's process, seen from outside."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        own = [f"--worker={name}", f"--size={arguments.size}", f"--batch={arguments.batch}"]
        own += [f"--altgrad={arguments.altgrad}"] if arguments.altgrad else []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process lives
        self._process = subprocess.Popen(
            [sys.executable, __file__, *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=worker_environment(ENVIRONMENT),
        )
        self._steps, self.peak_bytes = 1, None

    def started(self, patience: float) -> dict[str, Any]:
        """What it says once it has its step compiled and has run it, with "ready"; or why it has not."""
        answer = self._answer(patience)
        if "ready" not in answer:
            self.end()
        else:
            self._steps = max(1, min(MOST_STEPS, round(TURN_SECONDS / answer["ready"])))
        return answer

    def turn(self, patience: float) -> dict[str, Any]:
        """Seconds a step of its next steps; or why it has none."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `_answer` says how
            print(self._steps, file=self._process.stdin, flush=True)
        answer = self._answer(patience)
        self.peak_bytes = answer.get("peak_bytes", self.peak_bytes)
        return answer

    def _answer(self, patience: float) -> dict[str, Any]:
        """The next result that it prints."""
        assert self._process.stdout is not None
        alarm = threading.Timer(patience, self._process.kill)
        alarm.start()
        try:
            for line in self._process.stdout:
                if line.startswith(RESULT):
                    return json.loads(line.removeprefix(RESULT))
        finally:
            late = not alarm.is_alive()
            alarm.cancel()
        if late:
            return failed(f"no answer within {patience:g} s")
        status = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
        return failed(f"the process ended with status {status}: {last[0][:500]}")

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def work(arguments: argparse.Namespace) -> None:
    """The peer's process: gets ready, then takes as many steps as each line it reads asks for."""
    try:
        step = PEERS[arguments.worker](arguments.size, arguments.batch, arguments.altgrad)
        step.run(2)  # what is compiled at the first step is compiled now
        began = time.perf_counter()
        step.run(1)
    except ModuleNotFoundError as e:
        say(skipped(f"not installed: {e}"))
        return
    except Exception as e:  # whatever a library raises is the result
        say(failed(e))
        return
    say(step.facts | {"ready": time.perf_counter() - began})
    for line in sys.stdin:
        began = time.perf_counter()
        step.run(int(line))
        say({"seconds": (time.perf_counter() - began) / int(line), "peak_bytes": step.peak_bytes()})


if __name__ == "__main__":
    main()
