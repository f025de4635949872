"""What went wrong first, and where: the first time that a diagnostic of a run crossed its threshold.

For people who look at a run that failed. Of every layer, role and kind of failure the first crossing is kept, and they
are put in the order in which they happened: by step; within a step weight, activation, training loss, gradient, update,
validation loss; within those from the network's input to its output, for gradients from its output to its input. So the
first row with a NaN names its origin, and not the layers that it spread to.

    kind       metric                                  fails    why
    spoilt     quant/<layer>/<role>/nonfinite          > 0      an infinity or NaN came in: all that share its scale
                                                                are NaN
    nan        quant/<layer>/<role>/nan                > 0      one NaN spreads to every later value. Where none came
                                                                in: a spoilt operand is not counted here again
    overflow   quant/<layer>/<role>/overflow           > 0.01   the largest values, which carry most, are cut off
    underflow  quant/<layer>/<role>/energy_lost        > 0.19   what is left is more than 26 degrees off
               quant/<layer>/<role>/sum_lost           > 0.1    what is lost pulls one way and does not average out. Not
                                                                the share of elements: most of a tensor may be so small
                                                                that losing it changes nothing
    gradient   grads/<layer>/cosine                    < 0.9    more than 26 degrees off: noise of half its length
    stall      weights/<layer>/stall                   > 0.95   one update in twenty moves a weight. After warm-up, and
                                                                only of weights that the optimizer keeps on the grid:
                                                                others keep what their rounded values hide
    blow-up    weights/<layer>/relative_update         > 0.3    a step a third as long as the weight itself; 0.001 is
                                                                usual. Not of biases, which begin at zero
    rank       spectra/<layer>/effective_rank          >= 0.5   share lost since the first record: half the directions
                                                                are gone. The quick BF16 run, which is healthy, loses
                                                                up to 0.28 of attn.proj and wte, most of it in the
                                                                first 100 steps; e0m7, which is not, 0.75 of wte. Not
                                                                the stable rank, which falls by half in any healthy
                                                                run, as one singular value grows
    loss       train/loss, val/loss                    not finite

The step `optimizer.warmup_steps` is the first with the whole learning rate: warm-up ends before it. The role
of gradient is "gradient", of stall and blow-up "update", of rank "weight"; loss has no layer and no role. A
metric that is NaN, because there was nothing to measure, has not crossed. But a cosine that is NaN has, unless the
float32 gradient was zero: then the layer's relative error is NaN, and the cosine of the whole gradient is not.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from altgrad_jax.optimizers.factory import KEEP_TO_GRIDS

THRESHOLDS: Mapping[str, float] = {
    "spoilt": 0.0,
    "nan": 0.0,
    "overflow": 0.01,
    "underflow": 0.19,  # of the energy: 1 - 0.9^2
    "one-sided underflow": 0.1,  # of the sum
    "gradient": 0.9,
    "stall": 0.95,
    "blow-up": 0.3,
    "rank": 0.5,
    "loss": math.inf,
}
LOST = {"energy_lost": "underflow", "sum_lost": "one-sided underflow"}  # which threshold is a metric's
SIGNS = {"gradient": "<", "rank": ">="}  # of what fails; ">" of the others
KINDS = ("spoilt", "nan", "overflow", "underflow", "gradient", "stall", "blow-up", "rank", "loss")
# The parts of a step, in its order.
STAGES = ("weight", "activation", "train/loss", "gradient", "update", "val/loss")
BACKWARD = ("gradient",)
IN_BLOCK = ("norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class Failure:
    """The first crossing of one threshold by one layer.

    Attributes:
      layer: its name; "" of a loss.
      role: weight, activation, gradient or update; "" of a loss.
      kind: one of KINDS.
      step: of the record.
      value: what crossed; of rank, the share lost.
      threshold: what was crossed; infinity of a loss.
    """

    layer: str
    role: str
    kind: str
    step: int
    value: float
    threshold: float


@dataclass(frozen=True)
class Training:
    """What of a run decides whether a crossing is a failure.

    Attributes:
      warmup_steps: steps over which the learning rate rises.
      on_grid: whether the optimizer keeps weights on the grid, so that an update which moves none of them is lost.
    """

    warmup_steps: int = 0
    on_grid: bool = False


WITHOUT_WARMUP = Training()


def training_of(optimizer: Mapping[str, Any]) -> Training:
    """Of a run's `config.optimizer`, or what its manifest has of it."""
    warmup = optimizer.get("warmup_steps", 0)
    return Training(warmup if isinstance(warmup, int) else 0, optimizer.get("name") in KEEP_TO_GRIDS)


class Watch:
    """Finds the first crossings of a run record by record; the cost of one does not grow with those before it."""

    def __init__(
        self,
        training: Training,
        earlier: Iterable[Mapping[str, Any]] = (),
        thresholds: Mapping[str, float] = THRESHOLDS,
    ):
        """Has seen the records of earlier sessions; `thresholds` by kind, those left out are THRESHOLDS'."""
        self._training, self._limits = training, {**THRESHOLDS, **thresholds}
        self._ranks: dict[str, float] = {}
        self._seen: set[tuple[str, str, str]] = set()
        for record in earlier:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> list[Failure]:
        """What this record is the first to show, in the order in which it happened; records come by ascending step."""
        step, new = int(record["step"]), []
        crossings = _crossings(record, self._ranks, self._limits, self._training)
        for _stage, layer, role, kind, value, threshold in sorted(crossings, key=lambda c: _order(c[0], c[1], c[3])):
            if (layer, role, kind) not in self._seen:
                self._seen.add((layer, role, kind))
                new.append(Failure(layer, role, kind, step, value, threshold))
        return new


def first_failures(
    records: Sequence[Mapping[str, Any]],
    training: Training = WITHOUT_WARMUP,
    thresholds: Mapping[str, float] = THRESHOLDS,
) -> list[Failure]:
    """The first crossing of every (layer, role, kind), in the order in which they happened.

    Args:
      records: of a run, as `tracking.read_metrics` gives them: `step`, and slash-named numbers and texts.
      training: of that run.
      thresholds: by kind; those left out are THRESHOLDS'.
    """
    watch = Watch(training, (), thresholds)
    return [failure for record in sorted(records, key=lambda record: record["step"]) for failure in watch.add(record)]


def as_json(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """One dict a failure, in order; numbers that are not finite as "NaN", "Infinity" and "-Infinity"."""
    return [{key: _json_value(value) for key, value in asdict(failure).items()} for failure in failures]


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _crossings(
    record: Mapping[str, Any], ranks: dict[str, float], limits: Mapping[str, float], training: Training
) -> Iterator[tuple[str, str, str, str, float, float]]:
    """(stage, layer, role, kind, value, threshold) of every threshold crossed; `ranks` gathers the first of each."""
    warm = record["step"] >= training.warmup_steps
    for key, value in record.items():
        if not isinstance(value, (int, float)):
            continue
        match key.split("/"):
            case ["quant", layer, role, "nonfinite"] if value > limits["spoilt"]:
                yield role, layer, role, "spoilt", value, limits["spoilt"]
            case ["quant", layer, role, "nan"] if record.get(f"quant/{layer}/{role}/nonfinite", 0) > limits["spoilt"]:
                pass  # what came in is to blame
            case ["quant", layer, role, ("nan" | "overflow") as kind] if value > limits[kind]:
                yield role, layer, role, kind, value, limits[kind]
            case ["quant", layer, role, ("energy_lost" | "sum_lost") as what] if value > limits[LOST[what]]:
                yield role, layer, role, "underflow", value, limits[LOST[what]]
            case ["grads", layer, "cosine"] if value < limits["gradient"] or _lost(record, layer, value):
                yield "gradient", layer, "gradient", "gradient", value, limits["gradient"]
            case ["weights", layer, "stall"] if value > limits["stall"] and training.on_grid and warm:
                yield "update", layer, "update", "stall", value, limits["stall"]
            case ["weights", layer, "relative_update"] if value > limits["blow-up"] and not layer.endswith(".bias"):
                yield "update", layer, "update", "blow-up", value, limits["blow-up"]
            case ["spectra", layer, "effective_rank"] if not math.isnan(value):
                limit = limits["rank"]
                first = ranks.setdefault(key, value)
                if first > 0 and value <= (1 - limit) * first:
                    yield "weight", layer, "weight", "rank", 1 - value / first, limit
            case ["train" | "val", "loss"] if not math.isfinite(value):
                yield key, "", "", "loss", value, limits["loss"]


def _lost(record: Mapping[str, Any], layer: str, cosine: float) -> bool:
    """Whether a cosine is NaN because of the gradient, and not because the float32 one is zero."""
    error, whole = record.get(f"grads/{layer}/relative_error", 0.0), record.get("grads/cosine", math.nan)
    return math.isnan(cosine) and not (math.isnan(error) and not math.isnan(whole))


def _order(stage: str, layer: str, kind: str) -> tuple:
    """Sorts the crossings of a step in the order in which they happened."""
    depth = _depth(layer)
    if stage in BACKWARD:
        depth = (-depth[0], -depth[1])
    # An unknown role comes last.
    return STAGES.index(stage) if stage in STAGES else len(STAGES), depth, KINDS.index(kind), layer


def _depth(layer: str) -> tuple[int, int]:
    """Where in the network a layer or one of its parameters is: (block, place within it)."""
    if layer in ("wte", "wpe"):
        return 0, 0
    parts = layer.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdecimal():
        places = [i for i, place in enumerate(IN_BLOCK) if parts[2] == place or parts[2].startswith(place + ".")]
        return int(parts[1]) + 1, places[0] if places else len(IN_BLOCK)
    return 10**6, 1 if layer.startswith(("lm_head", "classifier")) else 0  # norm_f, or a layer of another network
