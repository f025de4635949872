"""The table that a sweep ends with."""

import json

from rich.console import Console

from altgrad_jax.sweep.progress import Progress


def test_conditions_by_their_last_loss_and_those_without_one_last(tmp_path):
    progress = Progress(Console(quiet=True))
    progress._folder = tmp_path
    progress._ended = {"e2m5-adamw-seed0": "diverged", "bf16": "finished", "e4m3": "finished"}
    for name, final in (("e2m5-adamw-seed0", {}), ("bf16", {"val/loss": 4.2151}), ("e4m3", {"val/loss": 4.15})):
        (tmp_path / name).mkdir()
        summary = {"status": progress._ended[name], "step": 1, "final": final}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert progress.table() == [
        "val loss  condition",
        "  4.1500  e4m3              finished",
        "  4.2151  bf16              finished",
        "       -  e2m5-adamw-seed0  diverged",
    ]
