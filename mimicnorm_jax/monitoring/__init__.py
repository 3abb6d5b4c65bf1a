"""Diagnostics of runs: the only place that knows training and diagnostics."""

from mimicnorm_jax.monitoring.hook import DiagnosticsHook, make_hook
from mimicnorm_jax.monitoring.networks import BoundModel, from_checkpoint, images, initialized, training_batch

__all__ = [
    "BoundModel",
    "DiagnosticsHook",
    "from_checkpoint",
    "images",
    "initialized",
    "make_hook",
    "training_batch",
]
