"""What happens when a step's loss or gradient is not finite."""

import math

from mimicnorm_jax import distributed
from mimicnorm_jax.errors import NonFiniteLossError
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.utils.console import log_line


class NonFiniteMonitor:
    """Counts steps that were left out because their loss or gradient is not finite, and ends a run of too many.

    Args:
      max_consecutive: steps in a row that may be left out.

    Attributes:
      skipped: steps of the whole run that were left out: so many the optimizer has not counted.
      consecutive: of those, the last ones in a row.
    """

    def __init__(self, max_consecutive: int) -> None:
        self._max_consecutive = max_consecutive
        self.consecutive = 0
        self.skipped = 0

    def __call__(self, metrics: Metrics, step: int, epoch: int, learning_rate: float) -> Metrics:
        """What a step adds to its epoch's metrics: its own, or nothing where it was left out.

        Args:
          metrics: of the step.
          step: counted from 1, for messages.
          epoch: counted from 1.
          learning_rate: of the step.

        Raises:
          NonFiniteLossError: at one more than `max_consecutive` in a row.
        """
        if math.isfinite(metrics.loss):
            self.consecutive = 0
            return metrics
        self.consecutive += 1
        where = f"at step {step} (epoch {epoch}), where the learning rate is {learning_rate:.4g}"
        if self.consecutive > self._max_consecutive:
            before = f", as were those of {self._max_consecutive} steps before" if self._max_consecutive else ""
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite {where}{before}. Lower --config.learning_rate, lengthen "
                f"--config.warmup_epochs, bound gradients with --config.clip_norm, or leave rare ones out with "
                f"--config.max_consecutive_nonfinite",
                {"step": step, "epoch": epoch, "learning_rate": learning_rate},
            )
        if distributed.is_first():
            count = f"{self.consecutive} of {self._max_consecutive}"
            log_line(f"warning: the loss or its gradient is not finite {where}: left out ({count})")
        self.skipped += 1
        return Metrics.empty()
