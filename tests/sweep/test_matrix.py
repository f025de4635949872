"""What a matrix consists of, which of it runs together, and what a user is told of one that cannot be."""

import ast
from collections import Counter

import pytest

from altgrad_jax.config import get, load_config
from altgrad_jax.errors import UsageError
from altgrad_jax.sweep.groups import groups as groups_of
from altgrad_jax.sweep.groups import program_keys
from altgrad_jax.sweep.matrix import conditions
from altgrad_jax.sweep.search import search_conditions
from tests.forks import ROOT
from tests.sweep.matrices import PLAIN


def matrix(argument: str = "quick", **changes):
    found = load_config(f"{ROOT / 'configs' / 'matrix.py'}:{argument}")
    found.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return found


def groups(found, together: int):
    return groups_of(found, program_keys(found)[1], together)


def names(*args, **kwargs) -> list[str]:
    return [c.name for c in conditions(matrix(*args, **kwargs), PLAIN)]


def test_the_product_less_what_is_left_out():
    assert names(seeds=(3, 4)) == [
        f"{cell}-seed{seed}"
        for seed in (3, 4)
        for cell in ("bf16-adamw", "e5m2-adamw", "e5m2-relative", "e4m3-adamw", "e4m3-relative")
    ]


def test_the_whole_of_formats8():
    found = conditions(matrix("formats8"), PLAIN)
    cells = Counter((c.facts["recipe"], c.facts["optimizer"]) for c in found)
    expected = {(f"e{e}m{7 - e}", o) for e in range(8) for o in ("adamw", "relative", "grid", "madam")}
    assert set(cells) == expected | {("bf16", "adamw"), ("bf16", "madam")} and set(cells.values()) == {3}


@pytest.mark.parametrize("argument", ["quick", "formats8,quick", "formats16", "layers", "scaling", "scaling,quick"])
def test_every_matrix_is_in_order(argument):
    found = conditions(matrix(argument), PLAIN)
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert c.config.seed == c.facts["seed"] and c.config.tracking.wandb == "disabled"


def test_layers_and_rates_are_named_where_there_are_several():
    found = conditions(matrix("layers", seeds=(0,), rates=(1.0, 0.5), recipes=(("e5m2", "e5m2"),)), PLAIN)
    assert [c.name for c in found][:3] == [
        "e5m2-adamw-all-rate1-seed0",
        "e5m2-adamw-all-rate0.5-seed0",
        "e5m2-adamw-attn.qkv-rate1-seed0",
    ]
    assert found[2].config.precision.rules == ((r"blocks\.\d+\.attn\.qkv", "e5m2"),)
    assert found[1].config.optimizer.learning_rate == 0.5 * found[0].config.optimizer.learning_rate


def test_bf16_is_run_once_whichever_layers_are_under_test():
    assert [n for n in names("layers", seeds=(0,)) if n.startswith("bf16")] == ["bf16-adamw-all-seed0"]


def test_rates_in_rungs_are_longer_by_the_mantissa():
    found = conditions(matrix("formats8", seeds=(0,), optimizers=("grid",), exclude=("recipe=bf16",)), PLAIN)
    rates = {c.facts["recipe"]: c.facts["learning_rate"] for c in found}
    assert rates["e3m4"] == 16 * rates["e7m0"] and rates["e0m7"] == 128 * rates["e7m0"]


def test_the_factor_of_a_search_is_the_optimizers_own():
    found = conditions(matrix(seeds=(0,)), PLAIN, {"relative": 4.0})
    rates = {(c.facts["recipe"], c.facts["optimizer"]): c.facts["learning_rate"] for c in found}
    assert rates["e5m2", "relative"] == 4 * rates["e5m2", "adamw"] == 4 * rates["bf16", "adamw"]


def test_a_condition_names_the_command_that_would_run_it_alone():
    condition = conditions(matrix(seeds=(5,)), PLAIN)[1]
    assert condition.command[:4] == ("python", "-m", "altgrad_jax.main", "--config=bf16")
    again = load_config(str(ROOT / "configs" / "bf16.py"))
    for option in condition.command[4:]:
        key, _, text = option.removeprefix("--config.").partition("=")
        value = text if isinstance(get(again, key), str) else ast.literal_eval(text)
        again.update_from_flattened_dict({key: value})
    expected, found = condition.config.to_dict(), again.to_dict()
    assert found | {"runtime": None} == expected | {"runtime": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ("recipe=bf17",)}, "'recipe=bf17' leaves out nothing"),
        ({"exclude": ("format=bf16",)}, "'format' is no axis; write AXIS=PATTERN"),
        ({"exclude": ("recipe=(",)}, "has no regular expression"),
        ({"exclude": ("",)}, "it is empty"),
        ({"exclude": ("recipe=.*",)}, "leaves out every condition"),
        ({"exclude": ()}, "condition bf16-relative-seed0: .*quantises none.*leave out what cannot be"),
        ({"optimizers": ("adamw", "adam")}, "'adam' has no settings; config.optimizer_settings has adamw, before"),
        ({"optimizers": ()}, "config.optimizers=.* must name one or more"),
        ({"seeds": (1, 1)}, "none of them twice"),
        ({"seeds": (0, "a")}, "config.seeds: 'a' is none of the whole numbers"),
        ({"seeds": (0, 2**31)}, "2147483648 must lie between 0 and 2147483647 "),
        ({"rates": ("x",)}, "config.rates: 'x' is none of the numbers"),
        ({"exclude": (1,)}, "config.exclude: 1 is none of the texts"),
        ({"recipes": (("a", "e5m2"), ("a", "e4m3"))}, "more than once"),
        ({"recipes": ("e5m2",)}, r"must be \(\(name, text\), ...\)"),
        ({"recipes": (("a b", "e5m2"), ("a-b", "e4m3")), "exclude": ()}, "two conditions have one name"),
        ({"recipes": (("x", "e9m9z"),), "exclude": ()}, "e9m9z"),
        ({"base.train.steps": 0}, "condition bf16-adamw-seed0: config.train.steps=0"),
    ],
)
def test_a_matrix_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        conditions(matrix(**changes), PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search.factors": (1.0, 0.0), "search.recipes": ("e5m2",)}, "must be numbers above 0"),
        ({"search.factors": ("a",), "search.recipes": ("e5m2",)}, "must be numbers above 0"),
        ({"search.factors": (1.0,), "search.recipes": ("e5m3",)}, "'e5m3' is none of config.recipes"),
        ({"search.factors": (1.0,)}, "needs recipes and seeds"),
        ({"search.factors": (1.0,), "search.recipes": ("e5m2",), "search.seeds": (1,)}, "also among config.seeds"),
    ],
)
def test_a_search_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        search_conditions(matrix(**changes), PLAIN)


def test_the_search_tries_every_optimizer_on_seeds_of_its_own():
    found = search_conditions(matrix("formats8"), PLAIN)
    cells = Counter((c.facts["optimizer"], c.facts["rate"]) for c in found)
    assert set(cells) == {
        (o, f) for o in ("adamw", "relative", "grid", "madam") for f in matrix("formats8").search.factors
    }
    assert {c.facts["seed"] for c in found} == {41, 42}
    assert search_conditions(matrix("quick"), PLAIN) == []


def test_formats_seeds_and_rates_share_a_program_and_optimizers_do_not():
    found = conditions(matrix("formats8", rates=(1.0, 2.0)), PLAIN)
    together = groups(found, 1000)
    assert sorted(len(g) for g in together) == [6, 6, 48, 48, 48, 48]
    for group in together:
        assert len({c.facts["optimizer"] for c in group}) == 1
        assert len({c.facts["recipe"] == "bf16" for c in group}) == 1
    assert sorted(c.name for g in together for c in g) == sorted(c.name for c in found)


def test_the_search_has_rates_and_seeds_of_its_own():
    """An exclusion of some of the matrix's is none of the search's."""
    changes = {"search.factors": (1.0, 2.0), "search.recipes": ("e5m2",), "rates": (1.0, 2.0)}
    found = matrix(**changes, exclude=("recipe=bf16 optimizer=relative", "rate=2.0 optimizer=adamw"))
    tried = [(c.facts["optimizer"], c.facts["rate"]) for c in search_conditions(found, PLAIN)]
    assert ("adamw", 2.0) in tried


def test_what_is_known_when_a_state_begins_or_in_doubles_alone_is_not_traced():
    """Madam's bound on the weights; Adam's 1 - b."""
    found = matrix(seeds=(0,), optimizers=("adamw",), exclude=())
    with found.unlocked():
        found.optimizer_settings.adamw.b2 = 0.99
        found.optimizer_settings.other = found.optimizer_settings.adamw.copy_and_resolve_references()
        found.optimizer_settings.other.b2 = 0.9
    found.optimizers = ("adamw", "other")
    assert all(len({c.facts["optimizer"] for c in g}) == 1 for g in groups(conditions(found, PLAIN), 9))


def test_groups_are_cut_into_parts_of_nearly_one_size():
    found = conditions(matrix("formats8", seeds=(0,), optimizers=("adamw",), exclude=()), PLAIN)
    sizes = [len(g) for g in groups(found, 6)]
    assert sizes == [1, 4, 4]


def test_scalings_do_not_share_a_program():
    found = conditions(matrix("scaling", seeds=(0,)), PLAIN)
    assert sorted(len(g) for g in groups(found, 100)) == [1, 2, 2, 2, 2, 2, 2]


def test_wide_formats_have_a_program_of_their_own():
    recipes = (("e5m2", "e5m2"), ("e5m10", "e5m10"), ("e3m12", "e3m12"))
    found = conditions(matrix(seeds=(0,), recipes=recipes, optimizers=("adamw",), exclude=()), PLAIN)
    assert [[c.facts["recipe"] for c in g] for g in groups(found, 9)] == [["e5m2"], ["e5m10", "e3m12"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"base.task": "classify"},
        {"base.stability.rewinds": 1},
        {"base.checkpoint.restore_from": "runs/x"},
        {"base.precision.backend": "native", "exclude": ("recipe=bf16",)},
    ],
    ids=["classify", "rewinds", "restore_from", "native"],
)
def test_what_needs_a_run_of_its_own(changes):
    found = conditions(matrix(**changes), PLAIN)
    assert [len(g) for g in groups(found, 9)] == [1] * len(found)
