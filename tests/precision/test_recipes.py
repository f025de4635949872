"""Recipes: what each name stands for, options for all operands and for one, and the error for every kind of mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.precision.formats import family, get_format
from altgrad_jax.precision.recipes import RECIPES, ROLES, parse_recipe

# Name -> format of x and w, format of g, scaling, overflow.
NAMED = {
    "e5m2": ("e5m2", "e5m2", "delayed", "saturate"),
    "e4m3": ("e4m3fn", "e4m3fn", "delayed", "saturate"),
    "hybrid": ("e4m3fn", "e5m2", "delayed", "saturate"),
    "e5m2_cast": ("e5m2", "e5m2", "none", "special"),
    "mxfp8": ("e4m3fn", "e4m3fn", "mx", "saturate"),
    "mxfp8_e5m2": ("e5m2", "e5m2", "mx", "saturate"),
    "mxfp6_e3m2": ("e3m2fn", "e3m2fn", "mx", "saturate"),
    "mxfp6_e2m3": ("e2m3fn", "e2m3fn", "mx", "saturate"),
    "mxfp4": ("e2m1fn", "e2m1fn", "mx", "saturate"),
}
OPTIONS = {
    "scaling": ("none", "static", "current", "delayed", "mx"),
    "granularity": ("tensor", "channel"),
    "scale": (0.25, 1.0, 1024.0),
    "history": (1, 16, 1024),
    "margin": (0, 3, 32),
    "rounding": ("nearest", "toward_zero", "stochastic"),
    "overflow": ("saturate", "special"),
}


def test_every_named_recipe_is_tested():
    assert set(NAMED) == set(RECIPES)


@pytest.mark.parametrize("name", NAMED)
def test_named(name):
    forward, gradient, scaling, overflow = NAMED[name]
    recipe = parse_recipe(name)
    assert recipe.name == name
    for role, fmt in zip(ROLES, (forward, forward, gradient), strict=True):
        found = recipe.role(role)
        assert found.fmt == get_format(fmt)
        assert (found.scaling, found.overflow, found.rounding) == (scaling, overflow, "nearest")
        assert (found.granularity, found.history, found.margin, found.scale) == ("tensor", 16, 0, 1.0)
        assert found.per_tensor == (scaling != "mx")
    assert (recipe.activation, recipe.weight, recipe.gradient) == tuple(map(recipe.role, ROLES))


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_bf16_leaves_a_layer_as_it_is(name):
    assert parse_recipe(name) is None


@pytest.mark.parametrize("name", [f.name for f in family(7)] + ["float8_e4m3fnuz", "float16", "float32", "e3m4:bias=1"])
def test_any_format_is_a_recipe(name):
    recipe = parse_recipe(name)
    assert {recipe.role(role).fmt for role in ROLES} == {get_format(name)}
    assert {recipe.role(role).scaling for role in ROLES} == {"delayed"}


def test_formats_of_single_operands():
    recipe = parse_recipe("e4m3fn g=e5m2 w=e3m4:bias=1,inf=0,nan=0")
    formats = [recipe.role(role).fmt for role in ROLES]
    assert formats == [get_format(name) for name in ("e4m3fn", "e3m4:bias=1,inf=0,nan=0", "e5m2")]


@pytest.mark.parametrize(("option", "values"), OPTIONS.items())
@pytest.mark.parametrize(("prefix", "roles"), [("", ROLES)] + [(f"{r[0]}.", (r,)) for r in ("weight", "gradient")])
def test_options_reach_all_operands_or_the_one_they_name(option, values, prefix, roles):
    base = {"granularity": "e5m2 scaling=current", "scale": "e5m2 scaling=static"}.get(option, "e5m2")
    before = parse_recipe(base)
    for value in values:
        recipe = parse_recipe(f"{base} {prefix}{option}={value}")
        for role in ROLES:
            if role in roles:
                assert getattr(recipe.role(role), option) == value
            else:
                assert recipe.role(role) == before.role(role)


def test_prefix_x_is_the_activations():
    recipe = parse_recipe("e5m2 x.rounding=stochastic")
    assert [recipe.role(role).rounding for role in ROLES] == ["stochastic", "nearest", "nearest"]


@given(st.permutations(["scaling=current", "rounding=toward_zero", "g=e4m3fn", "g.margin=2", "w.granularity=channel"]))
@settings(max_examples=20)
def test_order_of_different_options_does_not_matter(options):
    recipe, sorted_recipe = (
        parse_recipe(" ".join(["e5m2", *options])),
        parse_recipe(" ".join(["e5m2", *sorted(options)])),
    )
    assert [recipe.role(role) for role in ROLES] == [sorted_recipe.role(role) for role in ROLES]
    assert recipe.gradient.margin == 2 and recipe.weight.granularity == "channel" and not recipe.weight.per_tensor


def test_describe():
    recipe = parse_recipe("e4m3fn scaling=current x.granularity=channel w.scaling=static w.scale=0.5 g=e5m2 g.margin=1")
    assert recipe.activation.describe() == "e4m3fn current per channel"
    assert recipe.weight.describe() == "e4m3fn static(0.5)"
    assert recipe.gradient.describe() == "e5m2 current margin 1"
    assert parse_recipe("e5m2 history=4 rounding=stochastic").weight.describe() == "e5m2 delayed(4) stochastic"
    assert parse_recipe("e5m2_cast").weight.describe() == "e5m2 none overflows"
    assert parse_recipe("mxfp4").weight.describe() == "e2m1fn mx(32)"
    # Text is what tells a resumed run that its arithmetic is another: every option shows in it.
    texts = ["", "scaling=mx", "scaling=none", "history=4", "margin=1", "rounding=toward_zero", "overflow=special"]
    texts += ["scaling=static scale=2", "scaling=static scale=4", "scaling=current granularity=channel"]
    assert len({parse_recipe(f"e5m2 {text}").weight.describe() for text in texts}) == len(texts)


MISTAKES = [
    # Names: the nearest is named.
    ("", "unknown recipe or format ''"),
    ("hybird", "unknown recipe or format 'hybird': did you mean 'hybrid'"),
    ("mxfp9", "unknown recipe or format 'mxfp9': did you mean 'mxfp[84]'"),
    ("float18", "unknown recipe or format 'float18': did you mean 'float16'"),
    ("e5m2 g=e4m3fm", "unknown format 'e4m3fm': with these widths there are e4m3 .*e4m3fn .largest 448"),
    ("e5m2 w=hybrid", "'hybrid' is a recipe, of e4m3fn and e5m2, and no format"),
    ("e9m9", "has 19 bits"),
    ("e3m4:bias=x", "bias='x' is no integer"),
    ("e5m2 scailng=none", "unknown option 'scailng'; did you mean 'scaling'"),
    ("e5m2 g.rouding=stochastic", "unknown option 'rouding'; did you mean 'rounding'"),
    ("e5m2 per_tensor=1", "unknown option 'per_tensor'"),
    ("e5m2 fmt=e4m3fn", "unknown option 'fmt'"),
    ("e5m2 y.rounding=nearest", "'y' is not one of the operands x, w, g"),
    ("e5m2 gradient.rounding=nearest", "'gradient' is not one of the operands x, w, g"),
    # Values.
    ("e5m2 scaling=dynamic", "scaling='dynamic' is not one of none, static, current, delayed, mx"),
    ("e5m2 granularity=row", "granularity='row' is not one of tensor, channel"),
    ("e5m2 rounding=up", "rounding='up' is not one of nearest, toward_zero, stochastic"),
    ("e5m2 overflow=inf", "overflow='inf' is not one of saturate, special"),
    ("e5m2 history=many", "history='many' is no int"),
    ("e5m2 history=1.5", "history='1.5' is no int"),
    ("e5m2 history=0", "history=0 must lie between 1 and 65536 steps"),
    ("e5m2 g.history=-1", "history=-1 must lie between 1 and 65536"),
    ("e5m2 scaling=static scale=big", "scale='big' is no float"),
    ("e5m2 scaling=static scale=0", "scale=0.0 must be above 0"),
    ("e5m2 scaling=static scale=-1", "scale=-1.0 must be above 0"),
    ("e5m2 scaling=static scale=inf", "scale=inf must be finite"),
    ("e5m2 scaling=static scale=nan", "scale=nan must be above 0"),
    ("e5m2 scaling=static scale=4e38", "scale=4e.38 must be finite in float32"),
    ("e5m2 scaling=static scale=1e-40", "scale=1e-40 must be 0 or at least 1.18e-38"),
    (
        "e5m2 scaling=static g.scale=1e38",
        "scale=1e.38 must be at most 8.51e.37, so that its inverse is not 0",
    ),
    ("e5m2 history=99999999", "history=99999999 must lie between 1 and 65536"),
    ("e5m2 margin=-1", "margin=-1 must lie between 0 and 32"),
    ("e5m2 margin=33", "margin=33 must lie between 0 and 32"),
    # Options that would do nothing.
    ("e5m2 scale=2", "scale=2.0 of the activation goes with scaling=static, not delayed"),
    ("e5m2 scaling=current g.history=4", "history=4 of the gradient goes with scaling=delayed, not current"),
    ("e5m2_cast w.margin=1", "margin=1 of the weight goes with scaling=current or delayed or mx, not none"),
    # Names of others.
    ("nvfp4", "unknown recipe or format 'nvfp4': there are no blocks with E4M3 scales here"),
    ("MXFP8BlockScaling", "Transformer Engine's recipe of this name is mxfp8"),
    ("fp8", "format 'fp8' can mean e4m3fn .* or e5m2"),
    ("e5m2 w=E4M3", "format 'E4M3' can mean e4m3fn .*448.* or e4m3 .*240"),
    ("hybrid g=MXFP4", "'MXFP4' is a recipe, of e2m1fn, and no format"),
    # Form.
    ("e5m2 stochastic", "'stochastic' is not of the form option=value"),
    ("e5m2 scaling=", "'scaling=' is not of the form option=value"),
    ("e5m2 =none", "unknown option ''"),
    ("e5m2 scaling = none", "'scaling' is not of the form option=value"),
    # What does not go together.
    ("e5m2 granularity=channel", "granularity=channel of the activation goes with scaling=current, not delayed"),
    ("hybrid w.granularity=channel", "granularity=channel of the weight goes with scaling=current, not delayed"),
    ("mxfp8 g.granularity=channel", "granularity=channel of the gradient goes with scaling=current, not mx"),
    ("e5m2_cast granularity=channel", "goes with scaling=current, not none"),
    ("e8m0fnu", "e8m0fnu holds only powers of two"),
    ("e5m2 g=e8m0fnu", "e8m0fnu holds only powers of two"),
    ("bf16 scaling=current", "bf16 leaves a layer as it is and takes no options"),
    ("bfloat16 rounding=stochastic", "bf16 leaves a layer as it is and takes no options"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_recipe(text)
    assert "\n" not in str(error.value) and type(error.value) is ValueError


def test_names_of_recipes_in_any_case():
    for text, same in (
        ("HYBRID scaling=current", "hybrid scaling=current"),
        ("E4M3", "e4m3"),  # Transformer Engine's: all operands in OCP's E4M3
        ("MXFP8", "mxfp8"),
        ("Format.HYBRID", "hybrid"),
        ("F8E4M3FNUZ g=torch.float8_e5m2", "e4m3fnuz g=e5m2"),
    ):
        one, other = parse_recipe(text), parse_recipe(same)
        assert one is not None and other is not None
        assert [one.role(role) for role in ROLES] == [other.role(role) for role in ROLES]
    assert parse_recipe("e4m3").weight.fmt.max == 448
    assert parse_recipe("BF16") is None and parse_recipe("BFLOAT16") is None
