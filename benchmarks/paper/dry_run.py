"""Commands of the paper's scale tried without a GPU: compiled for one, and two steps of them taken on the CPU."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._results import table
from benchmarks.paper.experiments import Arm
from configs import cifar100
from mimicnorm_jax import monitoring, training
from mimicnorm_jax.data import DATASETS, DatasetSpec, Split
from mimicnorm_jax.errors import NonFiniteLossError
from mimicnorm_jax.planning import Cache
from mimicnorm_jax.training import TrainConfig, TrainingPlan, plan_training
from mimicnorm_jax.utils import log_line

TARGET = "h100"
STEPS = 2
"""Of the run on the CPU: the first has a learning rate of 0."""


@dataclass(frozen=True)
class Tried:
    """An arm that was tried.

    Attributes:
      arm: one of those with its program.
      config: that train.py would have.
      plan: of its programs on `TARGET`.
      ended: how the run on the CPU ended.
    """

    arm: Arm
    config: TrainConfig
    plan: TrainingPlan
    ended: str

    @property
    def bound_seconds(self) -> float:
        """Of an epoch, evaluation included: below this the device cannot be; not a prediction."""
        dataset, batch = DATASETS[self.config.dataset], self.config.batch_size
        step, evaluation = self.plan.step.bound_seconds, self.plan.evaluation.bound_seconds
        assert step is not None
        assert evaluation is not None
        return dataset.num_train // batch * step + -(-dataset.num_test // batch) * evaluation


def config_of(fields: dict[str, Any]) -> TrainConfig:
    """The config of `train.py --config=configs/cifar100.py` with these fields."""
    config = cifar100.get_config()
    config.update(fields)
    return training.validate(config)


def programs(arms: Sequence[Arm]) -> list[Arm]:
    """The first arm of each program; learning rates are numbers in it that change nothing else."""
    found: dict[str, Arm] = {}
    for arm in arms:
        same = {name: value for name, value in arm.fields.items() if name != "learning_rate"}
        found.setdefault(repr(sorted(same.items())), arm)
    return list(found.values())


@contextlib.contextmanager
def _noise(like: DatasetSpec, batch: int) -> Iterator[str]:
    """The name of a data set of noise for `STEPS` steps, in the form of another."""

    def split(count: int) -> Split:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, *like.image_shape)).astype(np.uint8)
        return Split(images, rng.integers(0, like.num_classes, count).astype(np.int32))

    def read(spec: DatasetSpec, data_dir: str) -> tuple[Split, Split]:
        del data_dir
        return split(spec.num_train), split(spec.num_test)

    name = f"noise like {like.name}, {batch}"
    DATASETS[name] = DatasetSpec(name, like.image_shape, like.num_classes, STEPS * batch, batch + 1, read)
    try:
        yield name
    finally:
        del DATASETS[name]


def take_steps(config: TrainConfig, check: Callable[[Path], Any]) -> str:
    """Trains one tiny epoch of a config on the CPU and checks the folder; how it ended."""
    batch = 2 * jax.device_count()
    with _noise(DATASETS[config.dataset], batch) as name, tempfile.TemporaryDirectory() as folder:
        tiny = dataclasses.replace(config, dataset=name, batch_size=batch, epochs=1, data_dir="")
        try:
            training.run(tiny, Path(folder) / "run", make_hook=monitoring.make_hook(tiny))
        except NonFiniteLossError as error:
            return f"ran; {str(error).split('. ')[0]}"  # two images and noise: it says nothing of the run
        check(Path(folder) / "run")
    return "ran"


def dry_run(arms: Sequence[Arm], fields_of: Callable[[Arm], dict[str, Any]], check: Callable[[Path, Arm], Any]) -> str:
    """Tries every program of some arms: a table.

    Args:
      arms: of the experiment.
      fields_of: what its command sets of the config for an arm.
      check: what is done with the folder of a finished run.
    """
    rows = []
    for arm in programs(arms):
        config = config_of(fields_of(arm))
        log_line(f"{arm.net}, {arm.method}: compiling for {TARGET}")
        plan = plan_training(config, TARGET, cache=Cache())
        found = Tried(arm, config, plan, take_steps(config, lambda folder, arm=arm: check(folder, arm)))
        rows.append(
            (
                arm.net,
                arm.method,
                config.dtype,
                config.batch_size,
                f"{plan.peak_bytes / 2**20:,.0f}{'' if plan.fits else ', does not fit'}",
                f"{found.bound_seconds:.2f}",
                found.ended,
            )
        )
    header = ["network", "method", "dtype", "batch", f"{TARGET}: peak, MiB", "s an epoch, at least"]
    return table([*header, f"{STEPS} steps on the CPU"], rows)
