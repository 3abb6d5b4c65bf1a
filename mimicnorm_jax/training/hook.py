"""What may look at a run between its steps: made by whoever starts the run, so that training knows no diagnostics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer
from mimicnorm_jax.training.writers import MetricWriter


class Hook(Protocol):
    """Called by the process that writes, before the first step and after each call of steps."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What it has found so far, in the order of steps; a picture is drawn of it at the end of the run."""
        ...

    def __call__(self, state: TrainState, step: int, num_steps: int) -> None:
        """Looks at a state, which it must not keep: the next step overwrites its buffers.

        Args:
          state: after `step` steps, on the devices.
          step: counted from the start of the run.
          num_steps: how many the call of steps did; 0 before the first.
        """
        ...


MakeHook = Callable[[Trainer, Path, MetricWriter, int], Hook]
"""Makes a hook of a run, its folder, the writer of its metrics, and the step from which it goes on."""
