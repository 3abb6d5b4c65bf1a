"""What happens when a step's loss or gradient is not finite."""

import math

from mimicnorm_jax import distributed
from mimicnorm_jax.errors import NonFiniteLossError
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.utils.console import log_line


class NonFiniteMonitor:
    """Counts steps that were left out because their loss or gradient is not finite, and ends a run of too many.

    Args:
      most: steps in a row that may be left out.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._row = 0

    def __call__(self, metrics: Metrics, step: int, epoch: int, rate: float) -> Metrics:
        """What a step adds to its epoch's metrics: its own, or nothing where it was left out.

        Args:
          metrics: of the step.
          step: counted from 1, for messages.
          epoch: counted from 1.
          rate: the step's learning rate.

        Raises:
          NonFiniteLossError: at one more than `most` in a row.
        """
        if math.isfinite(metrics.loss):
            self._row = 0
            return metrics
        self._row += 1
        where = f"at step {step} (epoch {epoch}), where the learning rate is {rate:.4g}"
        if self._row > self._most:
            row = f", as were those of {self._most} steps before" if self._most else ""
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite {where}{row}. Lower --config.learning_rate, lengthen "
                f"--config.warmup_epochs, bound gradients with --config.clip_norm, or leave rare ones out with "
                f"--config.max_consecutive_nonfinite",
                {"step": step, "epoch": epoch, "learning_rate": rate},
            )
        if distributed.is_first():
            log_line(f"warning: the loss or its gradient is not finite {where}: left out ({self._row} of {self._most})")
        return Metrics.empty()
