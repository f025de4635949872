"""What is done about what goes wrong: stopping a run whose loss is no longer a number."""

import math
from dataclasses import dataclass

from altgrad_jax.tracking import Record


@dataclass
class DivergenceWatch:
    """Decides when a run has diverged.

    The count of consecutive NaN or Inf losses is kept in the TrainState, on the device, so it survives a restart and
    does not depend on how often metrics are logged or which trackers are on.

    Attributes:
      patience: consecutive non-finite steps after which the run stops.
    """

    patience: int

    def diverged(self, record: Record) -> bool:
        """Whether this step's metrics end the run."""
        return int(record["train/nonfinite_steps"]) >= self.patience


def healthy(record: Record) -> bool:
    """Whether a state with these metrics is worth a checkpoint: its loss and gradient are finite.

    A gradient that is not finite has already spoilt the parameters, whatever the loss before the update said;
    except where dynamic loss scaling left the update out.
    """
    finite = math.isfinite(record["train/loss"]) and math.isfinite(record["train/grad_norm"])
    return finite or record.get("train/skipped") == 1.0
