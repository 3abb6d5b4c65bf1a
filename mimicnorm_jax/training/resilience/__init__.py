"""What keeps a run alive: checkpoints, preemption, non-finite steps."""

from mimicnorm_jax.training.resilience.checkpoint_reader import CheckpointMetadata, CheckpointReader
from mimicnorm_jax.training.resilience.checkpoints import Checkpoints
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError

__all__ = [
    "CheckpointMetadata",
    "CheckpointReader",
    "Checkpoints",
    "InterruptedRunError",
]
