"""What rounding one operand of one layer costs: against the model's own quantised products, one layer at a time."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.diagnostics import sensitivity
from altgrad_jax.layers import layer_shapes, layer_weights
from altgrad_jax.model import GPTConfig
from altgrad_jax.precision.grid import Grid
from altgrad_jax.precision.policy import TABLES, Policy, resolve
from altgrad_jax.precision.recipes import ROLES
from altgrad_jax.precision.scaling import RoleState
from altgrad_jax.state import init_params, model_structure
from altgrad_jax.step import window_loss
from tests import numpy_gpt

TIED = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=23, bias=True, compute_dtype="float32")
UNTIED = dataclasses.replace(TIED, bias=False, tie_embeddings=False)
BATCH = np.random.default_rng(0).integers(0, 23, (8, 3, 13)).astype(np.int32)  # devices, windows, tokens
QUICKLY = {"xla_backend_optimization_level": 0}  # of compilation, which is most of the time here
RECIPES = {
    "blocks.0.attn.qkv": ("e7m0", "scaling=delayed"),
    "blocks.0.attn.proj": ("e2m1fn", "scaling=mx"),
    "blocks.0.mlp.up": ("e2m1fn", "scaling=current granularity=channel rounding=stochastic"),
    "blocks.0.mlp.down": ("e0m7", "scaling=static scale=0.25"),
    "lm_head": ("e2m1fn", "scaling=current"),
    "wte": ("e2m1fn", "scaling=current granularity=channel"),
    "wpe": ("e1m6", "scaling=delayed margin=3"),
}
CASES = [(layer, role) for layer in RECIPES for role in ROLES if layer not in TABLES or role == "weight"]


def params_of(model: GPTConfig):
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    return jax.tree.map(jnp.asarray, numpy_gpt.random_like(shapes, 1))


def float32_loss(model: GPTConfig, tokens_BT1) -> float:
    loss = jax.jit(lambda params: window_loss(model_structure(model), params, tokens_BT1, 64, None))
    return float(loss(params_of(model)))


def with_history(quant, amax: float):
    """A state whose delayed scales are not those of the tensors at hand."""
    is_role = lambda x: isinstance(x, RoleState)  # noqa: E731
    set_history = lambda r: r if r.history is None else RoleState(r.history.at[0].set(amax), r.mean, r.grid)  # noqa: E731
    return jax.tree.map(set_history, quant, is_leaf=is_role)


def run(model: GPTConfig, policy: Policy, quant, batch_DBT1=BATCH[:1], tokens=0, **options):
    """(increases by layer and role, loss), the devices being those of a vmap."""
    measure = sensitivity.make_sensitivity(model_structure(model), policy, tokens=tokens)
    lanes = jax.vmap(
        lambda batch_BT1: measure(params_of(model), quant, batch_BT1, **options), 0, None, axis_name="data"
    )
    increases, loss = jax.jit(lanes, compiler_options=QUICKLY)(batch_DBT1)
    assert increases.shape == (len(policy.plans), 3)
    rows = zip(policy.plans, np.asarray(increases), strict=True)
    return {(plan.path, role): row[i] for plan, row in rows for i, role in enumerate(ROLES)}, float(loss)


def wide_grid(fmt: str) -> Grid:
    """A traced grid that float32 carries, of one structure for all formats, float32 itself among them."""
    alike = dataclasses.replace(Grid.of(fmt), carriers=("float32",), has_tiny_values=True, addable=False)
    return jax.tree.map(jnp.asarray, alike)


@pytest.fixture(scope="module")
def by_hand():
    """Every entry from the model's own quantised layers, with whole gradients that are formed and stepped along.

    All roles of all layers but one are rounded to float32. The formats are traced, for the sake of one compilation.
    """
    rules = [(layer, f"float32 {options}") for layer, (_, options) in RECIPES.items()]
    policy = resolve(rules, layer_shapes(TIED), traced=True)
    graphdef, params, share = model_structure(TIED), params_of(TIED), 4.0 / 3  # loss scale 4, 3 windows in the batch

    def loss_of(params, quant):
        layers, _ = policy.prepare(layer_weights(params), quant)
        layers = {path: p.fold_keys(0) for path, p in layers.items()}  # of the first device
        probes = policy.probes(layers)
        quantised = {path: (p, probes.get(path)) for path, p in layers.items()}
        return window_loss(graphdef, params, BATCH[0, :1], 64, None, quantised, share)

    def state_with(case) -> dict:
        def of_role(layer, role, state):
            return dataclasses.replace(state, grid=wide_grid(RECIPES[layer][0] if (layer, role) == case else "float32"))

        start = with_history(policy.init(), 0.7)
        return {path: {role: of_role(path, role, s) for role, s in roles.items()} for path, roles in start.items()}

    loss_and_grad = jax.jit(jax.value_and_grad(loss_of), compiler_options=QUICKLY)
    nothing = state_with(None)
    loss, clean = loss_and_grad(params, nothing)
    length = 0.01 * loss / (optax.tree.norm(clean) / share)

    def after(grads) -> float:
        step = length / optax.tree.norm(grads)
        return float(loss_and_grad(jax.tree.map(lambda p, g: p - step * g, params, grads), nothing)[0])

    after_clean = after(clean)
    entries = {}
    for case in CASES:
        rounded, grads = loss_and_grad(params, state_with(case))
        entries[case] = after(grads) - after_clean if case[1] == "gradient" else float(rounded - loss)
    return entries


@pytest.fixture(scope="module")
def mixed():
    policy = resolve([(layer, " ".join(recipe)) for layer, recipe in RECIPES.items()], layer_shapes(TIED))
    return run(TIED, policy, with_history(policy.init(), 0.7), loss_scale=4.0)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_every_entry_against_the_models_own_layers(mixed, by_hand, case):
    """Delayed, static, current, channel and block scales, stochastic rounding, biases, a tied output layer, tables."""
    increases, _ = mixed
    assert increases[case] == pytest.approx(by_hand[case], rel=1e-2, abs=3e-6)
    assert abs(by_hand[case]) > 1e-5, "something to be measured"


def test_the_loss_is_the_float32_loss_and_tables_have_no_activations(mixed):
    increases, loss = mixed
    assert loss == pytest.approx(float32_loss(TIED, BATCH[0, :1]))
    assert {case for case, value in increases.items() if np.isfinite(value)} == set(CASES)


# One program for all formats: float32 operands, and what they are rounded to in the state.
SOME = r"blocks\.0\.(attn\.qkv|mlp\.down)|lm_head"
TRACED = resolve([(SOME, "float32 scaling=none")], layer_shapes(UNTIED), traced=True)
COUNT = Counter()


def in_formats(everywhere: str, **others: tuple[str, str, str]):
    """A state with one format in all operands, and others in the (layer, role, format) given."""
    other = {(layer, role): fmt for layer, role, fmt in others.values()}
    return {
        path: {
            role: dataclasses.replace(state, grid=wide_grid(other.get((path, role), everywhere)))
            for role, state in roles.items()
        }
        for path, roles in TRACED.init().items()
    }


@pytest.fixture(scope="module")
def sure():
    """Batches of which the model predicts the first windows as they are: what changes it raises the loss."""
    batch, params = BATCH.copy(), jax.device_get(params_of(UNTIED))
    for window in batch[:, 0]:
        for i in range(8):
            window[i + 1] = numpy_gpt.logits(params, window[: i + 1], UNTIED.n_head)[-1].argmax()
    return batch


def count_traces(quant, batch_BT1):
    COUNT["traces"] += 1
    measure = sensitivity.make_sensitivity(model_structure(UNTIED), TRACED, tokens=8)
    return measure(params_of(UNTIED), quant, batch_BT1)


@pytest.fixture(scope="module")
def on_eight_devices():
    return jax.pmap(count_traces, axis_name="data", in_axes=(None, 0), out_axes=None)


def test_float32_costs_nothing(on_eight_devices):
    increases, loss = on_eight_devices(in_formats("float32"), BATCH)
    assert not np.asarray(increases).any(), "to the bit"
    tokens = BATCH[:, 0, :9]  # eight tokens and the one after them, of each device's first window
    assert float(loss) == pytest.approx(float32_loss(UNTIED, tokens))


@pytest.mark.parametrize(
    "failing",
    [
        ("blocks.0.mlp.down", "activation", "e2m1fn"),  # steps of 1/2
        ("lm_head", "weight", "e2m1fn"),
        ("blocks.0.attn.qkv", "gradient", "e0m7"),  # nothing below 1/256
    ],
)
def test_the_layer_that_is_made_to_fail_is_named(on_eight_devices, sure, failing):
    """All other operands are float16. Scales would mend it, but there are none."""
    layer, role, _ = failing
    increases, loss = on_eight_devices(in_formats("float16", failing=failing), sure)
    named = sensitivity.name(TRACED, np.asarray(increases), float(loss))
    assert named["sensitivity/worst"] == f"{layer} {role}" and named["sensitivity/loss"] == float(loss)
    costs = sorted(abs(value) for key, value in named.items() if len(key.split("/")) == 3)
    assert len(costs) == 3 * len(TRACED.plans)
    assert named[f"sensitivity/{layer}/{role}"] == costs[-1] > 3 * costs[-2]


def test_a_gradient_that_is_all_zero_costs_the_whole_step(on_eight_devices):
    """Of the output layer: nothing is left anywhere, so no step is made, where 1 % of the loss was to be had."""
    increases, loss = on_eight_devices(in_formats("float32", gone=("lm_head", "gradient", "e0m7")), BATCH)
    names = [plan.path for plan in TRACED.plans]
    assert float(increases[names.index("lm_head"), 2]) == pytest.approx(0.01 * float(loss), rel=0.3)
    assert np.count_nonzero(increases) == 1


def test_all_that_was_one_program(on_eight_devices):
    assert COUNT["traces"] <= 1


@pytest.mark.slow
def test_a_traced_format_is_that_format():
    policy = resolve([(SOME, "e4m3fn scaling=none")], layer_shapes(UNTIED))
    built_in, _ = run(UNTIED, policy, policy.init(), BATCH[:2])
    traced, _ = run(UNTIED, TRACED, in_formats("e4m3fn"), BATCH[:2])
    assert built_in.keys() == traced.keys()
    for case, value in built_in.items():
        assert traced[case] == pytest.approx(value, abs=2e-6), case


def test_the_worst_by_hand():
    policy = resolve([("blocks.0.attn.*", "e5m2"), ("wte", "e5m2")], layer_shapes(UNTIED))
    rows = np.array([[0.1, -0.5, 0.2], [0.0, 0.3, 0.0], [np.nan, 0.25, np.nan]], np.float32)
    assert sensitivity.name(policy, rows, 4.0) == {
        "sensitivity/loss": 4.0,
        "sensitivity/worst": "blocks.0.attn.proj weight",
        "sensitivity/blocks.0.attn.qkv/activation": pytest.approx(0.1),
        "sensitivity/blocks.0.attn.qkv/weight": -0.5,
        "sensitivity/blocks.0.attn.qkv/gradient": pytest.approx(0.2),
        "sensitivity/blocks.0.attn.proj/activation": 0.0,
        "sensitivity/blocks.0.attn.proj/weight": pytest.approx(0.3),
        "sensitivity/blocks.0.attn.proj/gradient": 0.0,
        "sensitivity/wte/weight": 0.25,
    }
    rows[0, 2] = np.nan
    assert sensitivity.name(policy, rows, 4.0)["sensitivity/worst"] == "blocks.0.attn.qkv gradient"
    assert sensitivity.name(policy, rows, np.nan)["sensitivity/worst"] == ""
    assert sensitivity.name(Policy(), np.zeros((0, 3)), 4.0) == {"sensitivity/loss": 4.0, "sensitivity/worst": ""}
