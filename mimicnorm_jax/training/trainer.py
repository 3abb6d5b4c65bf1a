"""What stays the same during a run, once its data is there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax

from mimicnorm_jax.data import BatchLayout, Dataset, Pipeline, ResidentPipeline, StreamedDataset
from mimicnorm_jax.data.streaming import BadImages, Cut, StreamingPipeline
from mimicnorm_jax.training import parallel
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import read_dataset
from mimicnorm_jax.training.moments import read_elsewhere
from mimicnorm_jax.training.resilience.nonfinite import NonFiniteMonitor
from mimicnorm_jax.training.spec import RunSpec
from mimicnorm_jax.training.step import StepConfig
from mimicnorm_jax.utils import environment


@dataclass(frozen=True)
class Trainer:
    """What stays the same during a run.

    Attributes:
      spec: what the run is.
      data_parallel: the devices.
      dataset: as it was read, or opened.
      pipeline: where batches come from.
      step_config: what the steps close over.
      schedule: the learning rate by step.
      train_steps, eval_step, sum_of_moved: the steps over the devices, see `DataParallel`.
      nonfinite: counts steps that were left out.
      bad_images: counts streamed images that were skipped.
    """

    spec: RunSpec
    data_parallel: parallel.DataParallel
    dataset: Dataset | StreamedDataset
    pipeline: Pipeline
    step_config: StepConfig
    schedule: optax.Schedule
    train_steps: parallel.TrainSteps
    eval_step: parallel.EvalStep
    sum_of_moved: parallel.SumOfMoved
    nonfinite: NonFiniteMonitor
    bad_images: BadImages

    @property
    def config(self) -> TrainConfig:
        """Of the run."""
        return self.spec.config

    @property
    def num_devices(self) -> int:
        """How many devices share a batch, those of other processes included."""
        return len(self.data_parallel.devices)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.pipeline.steps_per_epoch

    @cached_property
    def statistics_read(self) -> Any:
        """Of every leaf of `batch_stats`, whether a training step may depend on it: see `moments.read_elsewhere`."""
        b = self.config.batch_size // self.num_devices
        images = jax.ShapeDtypeStruct((b, *self.dataset.spec.image_shape), self.step_config.dtype)
        state = self.spec.state_template()
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return read_elsewhere(self.step_config, variables, images, self.num_devices)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the `step`-th step, counted from 1, once those before it are counted by `nonfinite`.

        Steps that were left out moved the optimizer no further. Of the last one counted, if it was itself left out, it
        is that of the step before it.
        """
        rate: Any = self.schedule(max(0, step - 1 - self.nonfinite.skipped))
        return float(rate)


def build_trainer(spec: RunSpec) -> Trainer:
    """Reads the data, puts it on the devices and builds the steps, which compile when they are first called.

    Raises:
      DataError: if the data is not prepared, or damaged.
    """
    config = spec.config
    data_parallel = parallel.DataParallel(tuple(jax.devices()), config.parallelism)
    bad = BadImages(config.max_bad_images)
    dataset = read_dataset(config, bad)
    layout = BatchLayout(
        config.batch_size, len(data_parallel.devices), data_parallel.local_devices, config.steps_per_call
    )
    pipeline: Pipeline = (
        _stream(config, dataset, layout, bad, data_parallel.place)
        if isinstance(dataset, StreamedDataset)
        else ResidentPipeline.put(dataset, data_parallel.replicate, config.seed, layout)
    )
    step_config, schedule = spec.make_step(len(dataset.train), dataset.mean, dataset.std)
    return Trainer(
        spec,
        data_parallel,
        dataset,
        pipeline,
        step_config,
        schedule,
        data_parallel.make_train_steps(step_config, pipeline.make_batch),
        data_parallel.make_eval_step(step_config, pipeline.make_batch),
        data_parallel.make_sum_of_moved(step_config, pipeline.make_batch),
        NonFiniteMonitor(config.max_consecutive_nonfinite),
        bad,
    )


def _stream(
    config: TrainConfig,
    dataset: StreamedDataset,
    layout: BatchLayout,
    bad: BadImages,
    place: Callable[[Any], Any],
) -> StreamingPipeline:
    return StreamingPipeline(
        sources=(dataset.train, dataset.test),
        cut=Cut(dataset.spec.image_shape[0], config.min_crop_area),
        seed=config.seed,
        layout=layout,
        bad=bad,
        num_threads=config.decoding_threads or environment.usable_cores(),
        place=place,
    )
