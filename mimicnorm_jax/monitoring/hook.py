"""Diagnostics along a run: one line of diagnostics.jsonl every so many steps, from before the first one on."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics import EmpiricalNTK, RegimeMeter
from mimicnorm_jax.diagnostics.regression import alignment, class_targets
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.models.head import LAST_BN
from mimicnorm_jax.monitoring.networks import network, test_examples
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.hook import MakeHook
from mimicnorm_jax.training.spec import OWN_METHOD
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer
from mimicnorm_jax.training.writers import JsonlWriter, MetricWriter
from mimicnorm_jax.utils.console import log_line

DIAGNOSTICS = "diagnostics.jsonl"
IMAGES = 32
"""Test images whose tangent kernel is measured."""
REGIME = ("kappa", "kappa_unit_diagonal", "chi", "growth")
"""Of `Regime`, what a line holds."""
ALIGNMENTS = ("alignment", "alignment_centered")


class DiagnosticsHook:
    """Measures a run's network: its regime, its alignment with the labels, and the last BatchNorm's running variance.

    The alignment is that of the pseudo-kernel of the test images with their labels, plain and centered; of a network
    that ends in a last BatchNorm, of the logits before it. What cannot be measured of a network that has come to
    diverge or is dead is null in a line, and the run's log says why.

    Args:
      trainer: of the run.
      folder: of the run; lines after `resumed_step` are dropped.
      writer: gets every line too.
      resumed_step: see `JsonlWriter`.

    Raises:
      ConfigError: if the run has a network of its own; in a call, if it cannot be measured before the first step.
      DataError: for one bad image too many.
    """

    def __init__(self, trainer: Trainer, folder: Path, writer: MetricWriter, resumed_step: int) -> None:
        if trainer.config.method == OWN_METHOD:
            raise ConfigError(
                f"config.diagnostics_epochs measures networks of mimicnorm_jax.models, and the run's is "
                f"{trainer.config.model}: set it to 0 in another --workdir, and measure checkpoints with "
                "mimicnorm_jax.diagnostics"
            )
        self._trainer = trainer
        self._writer = writer
        self._lines = JsonlWriter(folder / DIAGNOSTICS, resumed_step)
        self._meter: RegimeMeter | None = None
        self._kernel: EmpiricalNTK | None = None
        count = min(IMAGES, len(trainer.dataset.test))
        self._images, labels = test_examples(trainer.dataset, count, jnp.float32, trainer.bad_images)
        self._targets = class_targets(labels, trainer.dataset.spec.num_classes)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every line so far."""
        return self._lines.rows

    def __call__(self, state: TrainState, step: int, num_steps: int) -> None:
        """Measures the state after `step` steps, if the last `num_steps` of them reached a line that is due."""
        every = self._trainer.config.diagnostics_epochs * self._trainer.steps_per_epoch
        # A hair more, for fractions of an epoch that are whole numbers of steps but for rounding.
        due = step == 0 or math.floor(step / every + 1e-9) > math.floor((step - num_steps) / every + 1e-9)
        if not due or any(row["step"] == step for row in self.rows):
            return
        epoch = step / self._trainer.steps_per_epoch
        host = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        if self._meter is None or self._kernel is None:
            # With neutral running averages one function serves the whole run, resumed or not. Those of the last
            # BatchNorm scale the kernel of one output, of which the regime is, as a whole.
            neutral = jax.tree_util.tree_map_with_path(_neutral, host["batch_stats"])
            config, dataset = self._trainer.config, self._trainer.dataset.spec
            bound = network(config, dataset, {**host, "batch_stats": neutral}, "")
            self._meter = RegimeMeter(bound.apply_fn, batch_coupled=bound.batch_coupled)
            self._kernel = EmpiricalNTK(bound.apply_fn, output="pseudo", batch_coupled=bound.batch_coupled)
        row: dict[str, Any] = {"epoch": int(epoch) if epoch.is_integer() else epoch, "step": step}
        row |= _measured(step, REGIME, partial(self._regime, self._meter, host["params"]))
        row |= _measured(step, ALIGNMENTS, partial(self._alignments, self._kernel, host["params"]))
        if LAST_BN in host["batch_stats"]:
            variance = np.asarray(host["batch_stats"][LAST_BN]["var"])
            row |= {"last_bn_variance": float(variance.mean()), "last_bn_variance_std": float(variance.std())}
        row = {name: value if np.isfinite(value) else None for name, value in row.items()}
        self._lines.append(row)
        self._writer.scalars(row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step" and value is not None)
        log_line(f"diagnostics at {shown}")

    def _regime(self, meter: RegimeMeter, params: Any) -> tuple[float, ...]:
        found = meter(params, self._images, jax.random.key(self._trainer.config.seed))
        return tuple(getattr(found, name) for name in REGIME)

    def _alignments(self, kernel_of: EmpiricalNTK, params: Any) -> tuple[float, ...]:
        kernel = kernel_of(params, self._images)
        return alignment(kernel, self._targets), alignment(kernel, self._targets, centered=True)


def _measured(step: int, names: Sequence[str], measure: Callable[[], tuple[float, ...]]) -> dict[str, float]:
    """What is measured, by name; not a number where that cannot be, of a network that has come to diverge or is dead.

    Whether a run goes on is for its loss to say.

    Raises:
      ConfigError: if it cannot be measured before the first step.
    """
    try:
        return dict(zip(names, measure(), strict=True))
    except ValueError as error:
        if step == 0:
            raise ConfigError(
                f"config.diagnostics_epochs cannot measure this network: {error}. Set it to 0, in another --workdir"
            ) from error
        log_line(f"not measured: {', '.join(names)}: {error}")
        return dict.fromkeys(names, math.nan)


def _neutral(path: tuple[Any, ...], statistic: Any) -> np.ndarray:
    return np.ones_like(statistic) if path[-1].key == "var" else np.zeros_like(statistic)


def make_hook(config: TrainConfig) -> MakeHook | None:
    """What makes the hook that a config asks for with `diagnostics_epochs`; None if it asks for none."""
    return DiagnosticsHook if config.diagnostics_epochs else None
