"""Training: a config, a network and batches in; a folder with checkpoints, metrics and a summary out."""

from mimicnorm_jax.training.config import TrainConfig, base, validate
from mimicnorm_jax.training.evaluation import evaluate_checkpoints
from mimicnorm_jax.training.hook import Hook
from mimicnorm_jax.training.loop import run
from mimicnorm_jax.training.model import AXIS
from mimicnorm_jax.training.spec import RunSpec, build_spec
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.step import StepConfig, eval_step, train_step
from mimicnorm_jax.training.trainer import Trainer, build_trainer

__all__ = [
    "AXIS",
    "Hook",
    "RunSpec",
    "StepConfig",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "base",
    "build_spec",
    "build_trainer",
    "eval_step",
    "evaluate_checkpoints",
    "run",
    "train_step",
    "validate",
]
