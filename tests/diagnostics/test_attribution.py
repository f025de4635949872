"""Which layer and role went first: records written by hand, with the rows they must give."""

import json
import math

import pytest

from altgrad_jax.diagnostics import attribution
from altgrad_jax.diagnostics.attribution import (
    THRESHOLDS,
    Failure,
    Training,
    Watch,
    as_json,
    first_failures,
    training_of,
)
from altgrad_jax.diagnostics.wording import KINDS, describe, table

NAN, INF = math.nan, math.inf


ON_GRID = Training(on_grid=True)


def cases(records, training=ON_GRID, **thresholds) -> list[tuple]:
    return [(f.step, f.layer, f.role, f.kind) for f in first_failures(records, training, thresholds)]


@pytest.mark.parametrize(
    ("key", "good", "bad", "expected"),
    [
        ("quant/lm_head/gradient/nonfinite", 0.0, 1e-9, ("lm_head", "gradient", "spoilt")),
        ("quant/lm_head/weight/nan", 0.0, 1e-9, ("lm_head", "weight", "nan")),
        ("quant/blocks.0.mlp.up/activation/overflow", 0.01, 0.011, ("blocks.0.mlp.up", "activation", "overflow")),
        ("quant/blocks.11.attn.qkv/gradient/energy_lost", 0.19, 0.2, ("blocks.11.attn.qkv", "gradient", "underflow")),
        ("quant/lm_head/gradient/sum_lost", 0.1, 0.4, ("lm_head", "gradient", "underflow")),
        ("grads/blocks.0.norm_1.scale/cosine", 0.9, 0.89, ("blocks.0.norm_1.scale", "gradient", "gradient")),
        ("weights/wte/stall", 0.95, 0.96, ("wte", "update", "stall")),
        ("weights/wte/relative_update", 0.3, INF, ("wte", "update", "blow-up")),
        ("spectra/blocks.0.mlp.up/effective_rank", 10.0, 5.0, ("blocks.0.mlp.up", "weight", "rank")),
        ("spectra/blocks.0.mlp.proj/effective_rank", 10.0, 4.9, ("blocks.0.mlp.proj", "weight", "rank")),
        ("spectra/wte/effective_rank", 10.0, 0.0, ("wte", "weight", "rank")),
        ("train/loss", 1e30, NAN, ("", "", "loss")),
        ("val/loss", 9.0, INF, ("", "", "loss")),
    ],
)
def test_each_metric_alone(key, good, bad, expected):
    """The last good value, the first bad one, and a worse one that is not first."""
    assert cases([{"step": 1, key: good}, {"step": 2, key: bad}, {"step": 3, key: bad}]) == [(2, *expected)]
    kind = expected[2]
    if not key.startswith("spectra/"):
        [failure] = first_failures([{"step": 2, key: bad}], ON_GRID)
        assert failure.threshold == THRESHOLDS["one-sided underflow" if key.endswith("sum_lost") else kind]
        assert failure.value == bad or (math.isnan(failure.value) and math.isnan(bad))


def test_values_that_are_no_failures():
    assert not cases(
        [
            {
                "step": 0,
                "quant/weight/nan": 1.0,  # of all layers together
                "quant/lm_head/weight/amax": 1e9,
                "quant/lm_head/weight/codes": "ff00",
                "quant/lm_head/weight/energy_lost": NAN,
                "quant/lm_head/gradient/underflow": 0.997,  # most elements, and next to nothing of the tensor
                "quant/lm_head/gradient/energy_lost": 0.001,
                "weights/lm_head/stall": NAN,  # nothing was updated
                "weights/stall": 1.0,
                "weights/blocks.0.attn.qkv.bias/relative_update": INF,  # the first step of a bias
                "spectra/lm_head/rank_99": 1.0,
                "spectra/lm_head/effective_rank": NAN,
                "train/grad_norm": INF,
            },
            {"step": 1, "spectra/lm_head/effective_rank": 10.0, "spectra/blocks.0.mlp.up/effective_rank": 10.0},
            {"step": 2, "spectra/lm_head/effective_rank": 5.1, "spectra/blocks.0.mlp.up/effective_rank": 7.1},
        ]
    )


def test_a_rank_is_compared_with_its_own_first_record():
    key = "spectra/blocks.0.mlp.up"
    records = [
        {"step": 0, f"{key}/stable_rank": NAN},
        {"step": 1, f"{key}/stable_rank": 10.0, f"{key}/effective_rank": 100.0},
        {"step": 2, f"{key}/stable_rank": 20.0, f"{key}/effective_rank": 71.0},
        {"step": 3, f"{key}/stable_rank": 12.0, f"{key}/effective_rank": 49.0},
    ]
    [failure] = first_failures(list(reversed(records)))
    assert failure == Failure("blocks.0.mlp.up", "weight", "rank", 3, pytest.approx(0.51), 0.5)


def test_a_cosine_that_is_nan():
    """Where there was a float32 gradient it fails; where that was zero there was nothing to compare."""
    lost = {"step": 1, "grads/cosine": 0.99, "grads/wte/cosine": NAN, "grads/wte/relative_error": 1.0}
    nothing = lost | {"grads/wte/relative_error": NAN}
    spoilt = nothing | {"grads/cosine": NAN}
    assert [bool(cases([record])) for record in (lost, nothing, spoilt, {"step": 1, "grads/wte/cosine": NAN})] == [
        True,
        False,
        True,
        True,
    ]


def spread(layers, role: str, what: str, value: float) -> dict:
    return {f"quant/{layer}/{role}/{what}": value for layer in layers}


def test_the_first_row_names_the_origin_of_a_nan_forward():
    """An activation overflows to NaN in block 2: from there on everything is NaN, and all gradients, and the loss."""
    below = ["blocks.0.mlp.down", "blocks.1.attn.qkv"]
    above = ["lm_head", "blocks.10.attn.qkv", "blocks.2.mlp.up", "blocks.2.mlp.down", "blocks.3.attn.qkv"]
    spoilt = {"step": 40, "train/loss": NAN, "val/loss": NAN, "weights/wte/relative_update": INF}
    spoilt |= spread(below + above, "gradient", "nan", 1.0) | spread(above, "activation", "nan", 1.0)
    records = [{"step": 39, "train/loss": 5.0} | spread(below + above, "activation", "nan", 0.0), spoilt]
    rows = cases(records)
    assert [row[1] for row in rows[:5]] == [
        "blocks.2.mlp.up",
        "blocks.2.mlp.down",
        "blocks.3.attn.qkv",
        "blocks.10.attn.qkv",
        "lm_head",
    ]
    assert {row[2] for row in rows[:5]} == {"activation"}
    assert rows[5] == (40, "", "", "loss")
    assert [row[1:3] for row in rows[6:8]] == [("lm_head", "gradient"), ("blocks.10.attn.qkv", "gradient")]
    assert rows[-2:] == [(40, "blocks.0.mlp.down", "gradient", "nan"), (40, "wte", "update", "blow-up")]


def test_the_first_row_names_the_origin_of_a_nan_backward_and_of_weights():
    reached = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.up", "blocks.1.attn.qkv"]
    records = [
        {"step": 7, "train/loss": NAN},  # the update with these gradients was step 6
        {"step": 6, "train/loss": 4.0} | spread(reached, "gradient", "nan", 0.5),
    ]
    assert cases(records) == [
        (6, "blocks.1.attn.qkv", "gradient", "nan"),
        (6, "blocks.0.mlp.up", "gradient", "nan"),
        (6, "blocks.0.attn.proj", "gradient", "nan"),
        (6, "blocks.0.attn.qkv", "gradient", "nan"),
        (7, "", "", "loss"),
    ]
    everywhere = spread(["wte"], "activation", "nan", 1.0) | spread(
        ["lm_head", "blocks.5.mlp.up"], "weight", "nan", 1.0
    )
    assert cases([{"step": 1} | everywhere])[0] == (1, "blocks.5.mlp.up", "weight", "nan")


def test_a_nan_that_came_in_is_told_from_one_that_was_made():
    """A gradient overflows to NaN in block 1; below it every operand is NaN because it came to be given one."""
    record = {"step": 3} | spread(["blocks.1.mlp.up", "blocks.1.attn.qkv", "blocks.0.mlp.up"], "gradient", "nan", 1.0)
    record |= spread(["blocks.1.attn.qkv", "blocks.0.mlp.up"], "gradient", "nonfinite", 0.01)
    assert cases([record]) == [
        (3, "blocks.1.mlp.up", "gradient", "nan"),
        (3, "blocks.1.attn.qkv", "gradient", "spoilt"),
        (3, "blocks.0.mlp.up", "gradient", "spoilt"),
    ]


def test_thresholds_can_be_set_one_by_one():
    record = {"step": 1, "quant/lm_head/weight/overflow": 0.02, "quant/lm_head/weight/energy_lost": 0.3}
    assert cases([record], overflow=0.05) == [(1, "lm_head", "weight", "underflow")]


def test_table_and_json():
    failures = first_failures(
        [
            {"step": 5, "quant/blocks.0.mlp.down/gradient/sum_lost": 0.31},
            {"step": 120, "grads/lm_head/cosine": 0.5, "spectra/wte/effective_rank": 4.0, "train/loss": NAN},
            {"step": 121, "spectra/wte/effective_rank": 1.0},
        ]
    )
    assert table(failures) == [
        "step  layer              role      kind       value  limit",
        "   5  blocks.0.mlp.down  gradient  underflow   31 %  > 10 %",
        " 120  -                  -         loss         nan  not finite",
        " 120  lm_head            gradient  gradient     0.5  < 0.9",
        " 121  wte                weight    rank        75 %  >= 50 %",
        *(
            f"{kind}: {KINDS[kind].measured}; try {KINDS[kind].advice}"
            for kind in ("underflow", "loss", "gradient", "rank")
        ),
    ]
    assert table([]) == ["no diagnostic crossed its threshold"]
    first, loss, *_ = json.loads(json.dumps(as_json(failures), allow_nan=False))
    assert first == {
        "layer": "blocks.0.mlp.down",
        "role": "gradient",
        "kind": "underflow",
        "step": 5,
        "value": 0.31,
        "threshold": 0.1,
    }
    assert (loss["value"], loss["threshold"]) == ("NaN", "Infinity")
    assert first_failures([]) == [] == as_json([])


def test_every_kind_has_words():
    assert set(KINDS) == set(attribution.KINDS)


def test_a_warning_has_units_limits_and_advice():
    told = describe(
        [
            Failure("lm_head", "gradient", "overflow", 3, 0.0321, 0.01),
            *(Failure(f"blocks.{i}.mlp.up", "update", "blow-up", 3, 0.5, 0.3) for i in range(5)),
            Failure("", "", "loss", 3, NAN, INF),
            Failure("blocks.0.mlp.up", "gradient", "spoilt", 3, 1.0, 0.0),
        ]
    )
    assert "spoilt, share of the operand that came in as infinity or NaN > 0 %: blocks.0.mlp.up gradient 100 %;" in told
    assert "overflow, values beyond the largest > 1 %: lm_head gradient 3.21 %; try scaling=current" in told
    assert "blow-up, length of the update over the weight's > 0.3: blocks.0.mlp.up update 0.5," in told
    assert "and 2 more; try a lower learning rate" in told
    assert "loss, loss that is not finite: nan; try" in told


def test_the_ranks_of_a_healthy_run_are_no_failure():
    """Of the quick BF16 run, seed 42, at steps 1, 41, 101 and 281; then of one whose table collapsed (e0m7)."""
    healthy = {"wte": (126.0, 103.5, 93.0, 93.4), "blocks.3.attn.proj": (102.4, 94.2, 77.3, 75.3)}
    records = [
        {"step": step} | {f"spectra/{layer}/effective_rank": ranks[i] for layer, ranks in healthy.items()}
        for i, step in enumerate((1, 41, 101, 281))
    ]
    assert cases(records) == []
    collapsed = [{"step": s, "spectra/wte/effective_rank": r} for s, r in ((1, 126.0), (61, 76.5), (101, 50.6))]
    assert cases(collapsed) == [(101, "wte", "weight", "rank")]


def test_a_stall_is_a_failure_where_an_update_is_lost():
    """Not in warm-up, whose steps are short on purpose, and not of a float32 weight, which keeps them."""
    records = [{"step": step, "weights/wte/stall": 0.99} for step in (1, 19, 20, 40)]
    assert cases(records, Training(20, on_grid=True)) == [(20, "wte", "update", "stall")]
    assert cases(records, Training(20)) == []
    assert training_of({"name": "adamw_sr", "warmup_steps": 7}) == Training(7, True)
    assert training_of({"name": "manifold_adamw", "warmup_steps": "?"}) == training_of({}) == Training()


def test_record_by_record_is_all_at_once():
    """And a session that goes on from earlier ones says nothing twice."""
    names = ("quant/lm_head/gradient/energy_lost", "spectra/wte/effective_rank", "grads/wte/cosine", "val/loss")
    records = [{"step": s, **{name: 5.0 / (s + 1) * (-1) ** s for name in names}} for s in range(20)]
    records += [{"step": 20, "val/loss": NAN}]
    watch = Watch(ON_GRID)
    found = [failure for record in records for failure in watch.add(record)]
    assert found == first_failures(records, ON_GRID) and len(found) == 4
    again = Watch(ON_GRID, records[:7])
    assert [f for record in records[7:] for f in again.add(record)] == [f for f in found if f.step >= 7]


def test_the_cost_of_an_answer_does_not_grow(monkeypatch):
    """Crossings are looked for once a record, however many came before."""
    from altgrad_jax.diagnostics import attribution

    looked = []
    real = attribution._crossings
    monkeypatch.setattr(attribution, "_crossings", lambda record, *rest: looked.append(record) or real(record, *rest))
    watch = Watch(ON_GRID)
    for step in range(300):
        watch.add({"step": step, "grads/wte/cosine": 0.5})
    assert len(looked) == 300
