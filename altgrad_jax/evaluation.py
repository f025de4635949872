"""How good the current parameters are: the mean loss of a language model, the measures of a classifier.

A language model is judged on fixed windows of the validation split. A classifier is judged on every document of it,
at the threshold that gives the best micro F1 there; at the end that threshold decides on the test split as well.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
import numpy.typing as npt

from altgrad_jax.data.examples import Examples, evaluation_rows
from altgrad_jax.multilabel import best_threshold, combine, measures, sigmoid
from altgrad_jax.parallel import DataParallel, RunEval
from altgrad_jax.state import TrainState
from altgrad_jax.task import Classification
from altgrad_jax.tracking import Record


class Evaluation(Protocol):
    """Judges a state."""

    def validate(self, state: TrainState) -> Record:
        """Named scalars of the validation split, `val/loss` among them; waits for them."""
        ...

    def conclude(self, state: TrainState, validated: Record) -> Record:
        """What is said of the final state beside that; `validated` is what `validate` said of it."""
        ...


@dataclass(frozen=True)
class LanguageEvaluation:
    """Mean loss over fixed windows.

    Attributes:
      run: (state, sharded windows) -> mean nats per token.
      batches: the windows, on the devices.
      floor: the least nats per token that any model can expect; None where that is not known.
    """

    run: RunEval
    batches: list[jax.Array]
    floor: float | None

    def validate(self, state: TrainState) -> Record:
        """`val/loss`, `val/perplexity`, and `val/loss_above_floor` where the floor is known."""
        return self.record(float(np.mean(jax.device_get([self.run(state, batch) for batch in self.batches]))))

    def record(self, loss: float) -> Record:
        """What is logged of a mean loss."""
        record: Record = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        return record if self.floor is None else record | {"val/loss_above_floor": loss - self.floor}

    def conclude(self, state: TrainState, validated: Record) -> Record:
        """Nothing."""
        del state, validated
        return {}


@dataclass(frozen=True)
class Judged:
    """A split's documents as a classifier is judged on them.

    Attributes:
      batches: the rows of all its examples, this host's share, on the devices.
      examples: which document each is of.
      targets: which labels the documents carry, [documents, labels].
    """

    batches: list[jax.Array]
    examples: Examples
    targets: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelEvaluation:
    """Measures of a classifier.

    Attributes:
      run: (state, sharded rows) -> logits of all hosts' rows, [rows, labels].
      validation: the documents to choose the threshold on.
      test: those to report at the end; None where the corpus has none.
    """

    run: RunEval
    validation: Judged
    test: Judged | None

    def logits(self, state: TrainState, split: Judged) -> npt.NDArray[np.float64]:
        """Of every document, [documents, labels]; of several windows the mean."""
        rows = np.concatenate(jax.device_get([self.run(state, batch) for batch in split.batches]))
        return combine(rows[: len(split.examples)], split.examples.document, split.examples.documents)

    def validate(self, state: TrainState) -> Record:
        """`val/loss`, the mean binary cross entropy, every measure of `multilabel`, and the threshold.

        That is chosen among the logits: `val/threshold_logit`; `val/threshold` is its probability.
        """
        logits = self.logits(state, self.validation)
        if not np.isfinite(logits).all():
            return {"val/loss": math.nan}
        threshold = best_threshold(self.validation.targets, logits)
        return _record("val", measures(self.validation.targets, logits, threshold), threshold)

    def conclude(self, state: TrainState, validated: Record) -> Record:
        """The same of the test split, as `test/<measure>`, at the threshold of the validation split."""
        threshold = validated.get("val/threshold_logit")
        if self.test is None or threshold is None:
            return {}
        logits = self.logits(state, self.test)
        if not np.isfinite(logits).all():
            return {"test/loss": math.nan}
        return _record("test", measures(self.test.targets, logits, threshold), threshold)


def _record(split: str, found: Record, threshold: float) -> Record:
    """What is logged of a split."""
    found = found | {"threshold": float(sigmoid(np.array(threshold))), "threshold_logit": threshold}
    return {f"{split}/{name}": value for name, value in found.items()}


def label_evaluation(
    task: Classification, run: RunEval, parallel: DataParallel, batch_size: int, mine: slice
) -> LabelEvaluation:
    """The evaluation of a classifier; `mine` are this host's rows of a batch over all hosts."""

    def judged(split: str) -> Judged:
        examples = Examples(task.label_set.labels.cache, split, task.cutting)
        batches = [parallel.shard(rows[mine]) for rows in evaluation_rows(examples, batch_size)]
        return Judged(batches, examples, task.label_set.targets(split))

    has_test = "test" in task.label_set.labels.cache.splits
    return LabelEvaluation(run, judged("validation"), judged("test") if has_test else None)
