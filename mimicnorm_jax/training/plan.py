"""What a run of `train.py` will take on devices that need not be there: its very step, planned by their compiler."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.data.pipeline import Batch, MakeBatch, Selection, gather_batch
from mimicnorm_jax.data.specs import DatasetSpec
from mimicnorm_jax.data.streaming.pipeline import take_feed
from mimicnorm_jax.models.head import SplitNetwork
from mimicnorm_jax.planning import Cache, Plan, Target, plan, target
from mimicnorm_jax.planning.liveness import Buffer
from mimicnorm_jax.training import parallel
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import is_streamed
from mimicnorm_jax.training.model import head_of
from mimicnorm_jax.training.moments import Observed
from mimicnorm_jax.training.spec import build_spec

REMAT_SUFFIX = "_remat"
"""Behind a method's name: the network under `jax.checkpoint`, which keeps what convolutions and products return."""


@dataclass(frozen=True)
class TrainingPlan:
    """The plans of a run's programs.

    Attributes:
      method: of the run, with `REMAT_SUFFIX` if the network was checkpointed.
      batch_size: over all devices.
      step: of a training step. A program of several steps, see `config.steps_per_call`, is one of so many turns.
      evaluation: of an evaluation step.
      test_bytes: of the test images, which wait on the device during training.
      ahead_bytes: of the next step's images, or their indices, which are put on the device while a step runs.
      waiting_bytes: of what waits on the device during evaluation: training images, momentum, the next images.
      estimate: of the batch statistics of the averaged network, a step; None for a run without.
      estimate_waiting_bytes: of what waits on the device meanwhile.
    """

    method: str
    batch_size: int
    step: Plan
    evaluation: Plan
    test_bytes: int
    ahead_bytes: int
    waiting_bytes: int
    estimate: Plan | None = None
    estimate_waiting_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that the run has on a device at one time, by the plans."""
        peaks = [
            self.step.peak_bytes + self.test_bytes + self.ahead_bytes,
            self.evaluation.peak_bytes + self.waiting_bytes,
        ]
        if self.estimate is not None:
            peaks.append(self.estimate.peak_bytes + self.estimate_waiting_bytes)
        return max(peaks)

    @property
    def missing_bytes(self) -> int:
        """What the run needs beyond what it can have; 0 or less if it fits."""
        usable = self.step.usable_bytes
        return 0 if usable is None else self.peak_bytes - usable

    @property
    def fits(self) -> bool:
        """Whether the run needs no more than it can have."""
        return self.missing_bytes <= 0

    def as_json(self) -> dict[str, Any]:
        """The plan as what JSON can hold."""
        run = {"method": self.method, "batch_size": self.batch_size, "peak_bytes": self.peak_bytes}
        names = ["test_bytes", "ahead_bytes", "waiting_bytes", "fits"]
        parts = {"step": self.step, "evaluation": self.evaluation}
        if self.estimate is not None:
            names.append("estimate_waiting_bytes")
            parts["estimate"] = self.estimate
        waiting = {name: getattr(self, name) for name in names}
        return {**run, **waiting, **{name: json.loads(part.to_json()) for name, part in parts.items()}}


@dataclass(frozen=True)
class _Checkpointed:
    """A network that keeps what convolutions and matrix products return, and computes the rest again."""

    network: Any

    def split_head(self) -> SplitNetwork | None:
        split = head_of(self.network)
        body: Any = None if split is None else _Checkpointed(split.body)
        return None if split is None else split._replace(body=body)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Says what `apply` takes."""
        raise NotImplementedError("a network is applied to variables")

    def init(self, *arguments: Any, **options: Any) -> Any:
        return self.network.init(*arguments, **options)

    def apply(self, variables: Any, images: jax.Array, **options: Any) -> Any:
        rngs = options.pop("rngs", {})
        call = jax.checkpoint(
            lambda variables, images, rngs: self.network.apply(variables, images, rngs=rngs, **options),
            policy=jax.checkpoint_policies.dots_saveable,
        )
        return call(variables, images, rngs)


def plan_training(
    config: TrainConfig,
    target: Target | str,
    devices: int | None = None,
    checkpointed: bool = False,
    cache: Cache | None = None,
) -> TrainingPlan:
    """Compiles what `train.py` would run, without reading the dataset.

    The step is the run's: augmentation, the check for losses that are not finite, optimizer, average of the
    parameters, microbatches, the state donated, and the whole dataset resident on every device as an argument.
    For either `config.parallelism` the program that `jit(shard_map)` makes is compiled, as `jax.pmap` makes it inside
    too and cannot be asked for a grid of TPUs of several hosts.

    Args:
      config: of the run.
      target: see `planning.target`.
      devices: that share a batch; default: as many as the target's name says.
      checkpointed: the network under `jax.checkpoint` with the policy `dots_saveable`, to compare with.
      cache: of plans.

    Raises:
      ConfigError: names the field.
      PlanError: if there is no such target or its plugin is missing.
      DoesNotFitError: if the target's compiler refuses the program for want of memory.
    """
    found = _target(target)
    count = found.devices if devices is None else devices
    spec = build_spec(config, count)
    dataset = spec.dataset
    data_parallel = parallel.DataParallel(found.jax_devices(count), "shard_map")
    # Mean and deviation are numbers in the program, whose value changes nothing of what it takes.
    channels = dataset.image_shape[-1]
    step_config, _ = spec.make_step(dataset.num_train, (0.5,) * channels, (0.25,) * channels)
    if checkpointed:
        model: Any = _Checkpointed(step_config.model)
        step_config = dataclasses.replace(step_config, model=model)
    state, (training, test), make_batch = spec.state_template(), *_pipeline(config, dataset)
    share, steps = config.batch_size // count, config.steps_per_call
    feeds = _feed(config, dataset, (count, steps, share), masked=False)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32)

    def planned(kind: parallel.Kind, *shapes: Any) -> Plan:
        return _plan(data_parallel.program(kind, step_config, make_batch), shapes, found, cache)

    step = planned("train", state, training, feeds, num_steps)
    feed = _feed(config, dataset, (count, share), masked=True)
    evaluation = planned("evaluate", state.eval_variables, test, feed)
    waiting = _nbytes(training) + _nbytes(state) - _nbytes(state.eval_variables) + _nbytes(feed) // count
    ahead = _nbytes(feeds) // count
    method = config.method + REMAT_SUFFIX * checkpointed
    made = TrainingPlan(method, config.batch_size, step, evaluation, _nbytes(test), ahead, waiting)
    if state.ema_batch_stats is None:
        return made
    observed = Observed(state.eval_variables, jax.ShapeDtypeStruct((), jnp.int32))
    estimate = planned("estimate", observed, training, feeds, num_steps)
    # The averages that it starts from are arrays of their own; labels are no argument of it, as nothing reads them.
    alive = _nbytes((state, state.batch_stats, training, test, num_steps, observed.step)) + 2 * ahead
    return dataclasses.replace(made, estimate=estimate, estimate_waiting_bytes=alive - estimate.argument_bytes)


def _target(name: Target | str) -> Target:
    return target(name) if isinstance(name, str) else name


def _pipeline(config: TrainConfig, dataset: DatasetSpec) -> tuple[tuple[Any, Any], MakeBatch]:
    """What a run keeps on the devices of training and test images, and what makes a batch of it."""
    if is_streamed(config, dataset):
        return ((), ()), take_feed
    resident = _resident(dataset, dataset.num_train), _resident(dataset, dataset.num_test)
    return resident, partial(gather_batch, dataset.image_shape)


def _feed(config: TrainConfig, dataset: DatasetSpec, shape: tuple[int, ...], masked: bool) -> Any:
    def leaf(dtype: Any, *inner: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *inner), dtype)

    mask = leaf(jnp.float32) if masked else None
    if is_streamed(config, dataset):
        return Batch(leaf(jnp.uint8, *dataset.image_shape), leaf(jnp.int32), mask)
    return Selection(leaf(jnp.int32), mask)


def _resident(dataset: DatasetSpec, count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((count, math.prod(dataset.image_shape)), jnp.uint8)
    return images, jax.ShapeDtypeStruct((count,), jnp.int32)


def _plan(program: tuple[Any, tuple[Any, ...]], shapes: tuple[Any, ...], found: Target, cache: Cache | None) -> Plan:
    function, shardings = program
    placed = [
        jax.tree.map(lambda leaf, s=sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shape)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    made = plan(function, *placed, target=found, cache=cache)
    return dataclasses.replace(made, live=tuple(map(_with_plain_name, made.live)))


def _with_plain_name(buffer: Buffer) -> Buffer:
    for i, name in enumerate(("state", "data", "feed")):
        if buffer.layer.startswith(f"arguments[{i}]"):
            return dataclasses.replace(buffer, layer=buffer.layer.replace(f"arguments[{i}]", name, 1))
    return buffer


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
