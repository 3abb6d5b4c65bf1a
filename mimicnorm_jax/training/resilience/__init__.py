"""What keeps a run alive: checkpoints, preemption, non-finite steps."""

from mimicnorm_jax.training.resilience.checkpoints import CheckpointMetadata, Checkpoints
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError

__all__ = [
    "CheckpointMetadata",
    "Checkpoints",
    "InterruptedRunError",
]
