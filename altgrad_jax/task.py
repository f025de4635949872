"""What a run learns: the next token of a text (`lm`), or the labels of a document (`classify`).

A task is chosen once, from the configuration and, for labels, the corpus. It says what a row of a batch is and what
its loss, where training begins, and what must not change when a run resumes; the step, the optimizers, precision and
the loop are the same for both. How the result is judged is in `evaluation`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from altgrad_jax.data.batches import TrainBatches
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.data.examples import Cutting, ExampleBatches, Examples
from altgrad_jax.data.label_set import LabelSet, choose_labels
from altgrad_jax.data.labels import open_labels
from altgrad_jax.errors import UserError
from altgrad_jax.multilabel import binary_cross_entropy
from altgrad_jax.objectives import NEXT_TOKEN, LabelLoss, Objective

TASKS = ("lm", "classify")
HEAD = "classifier"  # of a classifier's parameters
MOST_BALANCED = 16.0  # the largest weight that "balanced" gives a label's positives


@dataclass(frozen=True)
class Task:
    """Learning the next token.

    Attributes:
      objective: what a batch's rows are, and their loss.
    """

    objective: Objective

    @property
    def labels(self) -> int:
        """Outputs of a classifier; 0: a language model."""
        return 0

    def identity(self) -> dict[str, Any]:
        """What must not change when a run resumes, beside `provenance.identity`."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"name": "lm"}

    def lines(self) -> dict[str, str]:
        """What the run's header says of it."""
        return {}

    def begin(self, params: Any) -> Any:
        """Freshly drawn parameters as training begins with them."""
        return params

    def batches(self, config: ConfigDict, cache: TokenCache, host: int = 0, hosts: int = 1) -> Any:
        """The training batches of a host: `from_step`, `documents_of`, `epoch_of`."""
        return TrainBatches(cache, config.model.block_size, config.train.batch_size, config.seed, host, hosts)


LANGUAGE = Task(NEXT_TOKEN)


@dataclass(frozen=True)
class Classification(Task):
    """Learning which labels a document carries.

    Attributes:
      objective: a `LabelLoss`.
      label_set: the labels.
      cutting: how documents become examples.
    """

    objective: LabelLoss
    label_set: LabelSet
    cutting: Cutting

    @property
    def labels(self) -> int:
        """Outputs of the classifier."""
        return len(self.label_set)

    def identity(self) -> dict[str, Any]:
        """Task, labels, policy and weights, as flat dotted names."""
        return {
            "task": "classify",
            "classify.labels": self.labels,
            "classify.labels_sha256": self.label_set.sha256,
            "classify.long_documents": self.cutting.long_documents,
            "classify.max_windows": self.cutting.max_windows,
            "classify.positive_weight": [round(weight, 6) for weight in self.objective.positive_weight],
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """For each split: documents, those longer than what is read, those without a label, examples, labels."""
        found, cache = {}, self.label_set.labels.cache
        for split in cache.splits:
            examples, targets = Examples(cache, split, self.cutting), self.label_set.targets(split)
            found[split] = {
                "documents": len(targets),
                "cut": examples.cut_documents,
                "unlabelled": int((~targets.any(1)).sum()),
                "examples": len(examples),
                "labels": int(targets.sum()),
            }
        return found

    def prior_loss(self, split: str) -> float:
        """Mean binary cross entropy of a model that gives every document the labels' training frequencies."""
        targets = self.label_set.targets(split)
        return binary_cross_entropy(targets, np.broadcast_to(self.label_set.log_odds(), targets.shape))

    def describe(self) -> dict[str, Any]:
        """Everything that says which output is which label, and what was trained on."""
        return {
            "name": "classify",
            "labels": self.labels,
            "labels_of_corpus": len(self.label_set.labels.header.labels),
            "label_ids": list(self.label_set.ids),
            "label_names": list(self.label_set.names),
            "splits": self.counts(),
            "prior_loss": self.prior_loss("validation"),
        }

    def lines(self) -> dict[str, str]:
        """Labels and documents."""
        counts, everything = self.counts(), len(self.label_set.labels.header.labels)
        documents = ", ".join(
            f"{split} {of['documents']:,} ({of['unlabelled']:,} without a label, {of['cut']:,} cut short)"
            for split, of in counts.items()
        )
        mean = counts["train"]["labels"] / counts["train"]["documents"]
        return {
            "labels": f"{self.labels:,} of the corpus's {everything:,}, {mean:.1f} a training document",
            "documents": documents,
            "examples": f"{counts['train']['examples']:,} for training, of up to {self.cutting.block_size} tokens"
            f" ({self.cutting.long_documents})",
            "label prior": f"validation loss {self.prior_loss('validation'):.4f} nats a decision, without reading",
        }

    def begin(self, params: Any) -> Any:
        """The biases of the outputs say how frequent each label is (Lin et al. 2017): that need not be learned."""
        return params | {HEAD: params[HEAD] | {"bias": self.label_set.log_odds()}}

    def batches(self, config: ConfigDict, cache: TokenCache, host: int = 0, hosts: int = 1) -> Any:
        """As for language."""
        train = config.train
        return ExampleBatches(cache, self.label_set, self.cutting, train.batch_size, config.seed, host, hosts)


def make_task(config: ConfigDict, cache: TokenCache) -> Task:
    """The task that a validated configuration names, on this corpus.

    Raises:
      UserError: the corpus has no labels, too few documents of each, or no validation split to choose a threshold on.
    """
    if config.task == "lm":
        return LANGUAGE
    settings = config.classify
    if "validation" not in cache.splits:
        raise UserError(
            f"config.task=classify picks its threshold on a validation split, and {cache.header.source.name!r} has"
            f" {', '.join(cache.splits)}; add one"
        )
    label_set = choose_labels(open_labels(cache), settings.min_documents)
    weight: tuple[float, ...] = (float(settings.positive_weight),)
    if not settings.positive_weight:
        # As many positives as negatives by weight, up to a bound: a label of few documents would else drown the rest.
        weight = tuple(float(w) for w in np.clip(np.exp(-label_set.log_odds()), 1.0, MOST_BALANCED))
    cutting = Cutting(config.model.block_size, settings.long_documents, settings.max_windows)
    return Classification(LabelLoss(len(label_set), weight), label_set, cutting)


def task_of(config: ConfigDict) -> Task:
    """`make_task`, opening (or building) the corpus where the task needs it: what compiles a step asks for no data."""
    return LANGUAGE if config.task == "lm" else make_task(config, open_corpus(config))
