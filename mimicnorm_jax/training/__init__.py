"""Training: a config, a network and batches in; a folder with checkpoints, metrics and a summary out.

The list has three parts: a run from its config (`run`, and what reads its folder or plans it), the objects that a run
is made of (`RunSpec`, `Trainer`), and the step of a loop of your own (`train_step`).
"""

from mimicnorm_jax.training.config import METHOD_FIELDS, TrainConfig, base, validate, with_model
from mimicnorm_jax.training.epoch import train_epoch
from mimicnorm_jax.training.evaluation import evaluate_checkpoints
from mimicnorm_jax.training.loop import run
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.model import AXIS
from mimicnorm_jax.training.plan import TrainingPlan, plan_training
from mimicnorm_jax.training.spec import RunSpec, build_spec
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.step import StepConfig, eval_step, train_step
from mimicnorm_jax.training.trainer import Trainer, build_trainer
from mimicnorm_jax.training.workdir import lock_workdir, read_config
from mimicnorm_jax.training.writers import read_metrics

__all__ = [
    "AXIS",
    "METHOD_FIELDS",
    "Metrics",
    "RunSpec",
    "StepConfig",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "TrainingPlan",
    "base",
    "build_spec",
    "build_trainer",
    "eval_step",
    "evaluate_checkpoints",
    "lock_workdir",
    "plan_training",
    "read_config",
    "read_metrics",
    "run",
    "train_epoch",
    "train_step",
    "validate",
    "with_model",
]
