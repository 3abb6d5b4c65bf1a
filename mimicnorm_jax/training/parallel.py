"""The one place that maps steps over devices, of one process or many, each with the whole state and resident data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimicnorm_jax.data.pipeline import Feed, MakeBatch, Resident
from mimicnorm_jax.training import moments, step
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.model import AXIS
from mimicnorm_jax.training.state import TrainState

Tree = TypeVar("Tree")
Device = Any  # jax.Device, which type checkers do not see
TrainSteps = Callable[[TrainState, Resident, Feed, int], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Resident, Feed], Metrics]
SumOfMoved = Callable[[moments.Observed, Resident, Feed, int], Any]
Specs = tuple[PartitionSpec, ...]
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)
_TRAIN_SPECS: Specs = (REPLICATED, REPLICATED, SHARDED, REPLICATED)
_EVAL_SPECS: Specs = (REPLICATED, REPLICATED, SHARDED)
Kind = Literal["train", "evaluate", "estimate"]
"""Of `step.train_steps`, `step.eval_feed` and `moments.sum_of_moved`."""


@dataclass(frozen=True)
class DataParallel:
    """Devices, and how functions of one device's part of a batch are mapped over them.

    Attributes:
      devices: of all processes; D of them.
      parallelism: `pmap`, or its successor `shard_map`.
    """

    devices: tuple[Device, ...]
    parallelism: str = "pmap"

    @property
    def local_devices(self) -> tuple[int, ...]:
        """Places, among the devices, of those of this process; L of them."""
        return tuple(i for i, device in enumerate(self.devices) if _is_addressable(device))

    def replicate(self, tree: Tree) -> Tree:
        """Puts a copy of every leaf on every device, once; steps then take it without a transfer."""
        # pmap takes and returns what is on this process's devices, shard_map what is on all.
        return jax.device_put(tree, self._sharding(REPLICATED, local=self.parallelism == "pmap"))

    def place(self, feed: Tree) -> Tree:
        """Puts this process's part of a feed, every leaf `(L, ...)`, on its devices, where steps take it as it is."""
        return (
            jax.device_put(feed, self._sharding(SHARDED, local=True))
            if self.parallelism == "pmap"
            else (jax.tree.map(partial(jax.make_array_from_process_local_data, self._sharding(SHARDED)), feed))
        )

    def make_train_steps(self, config: step.StepConfig, make_batch: MakeBatch) -> TrainSteps:
        """`step.train_steps` over devices: `(state, resident, feeds (L, K, ...), num_steps) -> (state, metrics (K,))`.

        Donates the state. Every process gives its own devices' feeds.
        """
        return self._map(*_mapped("train", config, make_batch))

    def make_eval_step(self, config: step.StepConfig, make_batch: MakeBatch) -> EvalStep:
        """`step.eval_feed` over devices: `(variables, resident, feed (L, ...)) -> metrics`."""
        return self._map(*_mapped("evaluate", config, make_batch))

    def make_sum_of_moved(self, config: step.StepConfig, make_batch: MakeBatch) -> SumOfMoved:
        """`moments.sum_of_moved` over devices: `(observed, resident, feeds (L, K, ...), num_steps) -> sums`."""
        return self._map(*_mapped("estimate", config, make_batch))

    def program(
        self, kind: Kind, config: step.StepConfig, make_batch: MakeBatch
    ) -> tuple[Any, tuple[NamedSharding, ...]]:
        """What runs of a function under shard_map, to be lowered, and the shardings of its arguments.

        Args:
          kind: which function.
          config, make_batch: that it closes over.
        """
        return self._program(*_mapped(kind, config, make_batch))

    def _sharding(self, spec: PartitionSpec, local: bool = False) -> NamedSharding:
        devices = [device for device in self.devices if not local or _is_addressable(device)]
        return NamedSharding(Mesh(np.array(devices), (AXIS,)), spec)

    def _map(self, function: Callable[..., Any], specs: Specs, donate: tuple[int, ...]) -> Any:
        return {"pmap": self._pmap, "shard_map": self._shard_map}[self.parallelism](function, specs, donate)

    def _pmap(self, function: Callable[..., Any], specs: Specs, donate: tuple[int, ...]) -> Any:
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=tuple(0 if spec == SHARDED else None for spec in specs),
            out_axes=None,  # type: ignore[arg-type]  # None is documented for outputs that are the same everywhere
            donate_argnums=donate,
            devices=self.devices,
        )

    def _program(
        self, function: Callable[..., Any], specs: Specs, donate: tuple[int, ...]
    ) -> tuple[Any, tuple[NamedSharding, ...]]:
        def on_a_device(*arguments: Any) -> Any:
            return function(*_sharded(lambda leaf: leaf[0], arguments, specs))

        # With check_vma the gradient of replicated parameters would come summed over devices already.
        mesh = self._sharding(SHARDED).mesh
        mapped = jax.jit(
            jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False),
            donate_argnums=donate,
        )
        return mapped, tuple(self._sharding(spec) for spec in specs)

    def _shard_map(self, function: Callable[..., Any], specs: Specs, donate: tuple[int, ...]) -> Any:
        mapped, _ = self._program(function, specs, donate)
        sharding = self._sharding(SHARDED)

        def place(leaf: Any) -> jax.Array:
            return leaf if isinstance(leaf, jax.Array) else jax.make_array_from_process_local_data(sharding, leaf)

        def from_local(*arguments: Any) -> Any:
            return mapped(*_sharded(place, arguments, specs))

        return from_local


def _mapped(
    kind: Kind, config: step.StepConfig, make_batch: MakeBatch
) -> tuple[Callable[..., Any], Specs, tuple[int, ...]]:
    """A function of one device's part, how its arguments lie on the devices, and which of them are donated."""
    mapped: dict[Kind, tuple[Callable[..., Any], Specs, tuple[int, ...]]] = {
        "train": (step.train_steps, _TRAIN_SPECS, (0,)),
        "evaluate": (step.eval_feed, _EVAL_SPECS, ()),
        "estimate": (moments.sum_of_moved, _TRAIN_SPECS, ()),
    }
    function, specs, donate = mapped[kind]
    return partial(function, config, make_batch), specs, donate


def _is_addressable(device: Device) -> bool:
    return device.process_index == jax.process_index()


def _sharded(function: Callable[[Any], Any], arguments: tuple[Any, ...], specs: Specs) -> list[Any]:
    """The arguments, with a function applied to every leaf of those that are sharded."""
    pairs = zip(arguments, specs, strict=True)
    return [jax.tree.map(function, argument) if spec == SHARDED else argument for argument, spec in pairs]
