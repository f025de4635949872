"""Differences between two runs in a line."""

from altgrad_jax.differences import differences


def test_hashes_are_short_and_layers_that_changed_alike_stand_together():
    hashed = {"data.sha256": "0123456789abcdef" * 4}
    alike = {
        f"precision.layers.blocks.{i}.mlp.up": "e4m3fn delayed(16) | e4m3fn delayed(16) | e4m3fn delayed(16)"
        for i in range(9)
    }
    mixed = {"precision.layers.lm_head": "e4m3fn current | e4m3fn current | e5m2 current"}
    other = {name: text.replace("e4m3fn", "e3m4") for name, text in alike.items()}
    before = hashed | alike | mixed | {"seed": 1, "same": 2}
    now = {"data.sha256": "f" * 64} | other | {"seed": 2, "same": 2, "model.bias": True}
    assert differences(before, now) == (
        "data.sha256: 01234567 -> ffffffff; model.bias: absent -> True; seed: 1 -> 2; 9 layers: e4m3fn -> e3m4;"
        " precision.layers.lm_head: e4m3fn current | e4m3fn current | e5m2 current -> absent"
    )
    assert differences(before, now, most=1) == "data.sha256: 01234567 -> ffffffff; and 4 more"
    assert differences(before, dict(before)) == ""
