"""The one place that spreads steps over devices, of one process or many, each with the whole state and data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimicnorm_jax.training import step
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.state import TrainState

Tree = TypeVar("Tree")
Device = Any  # jax.Device, which type checkers do not see
TrainSteps = Callable[[TrainState, Any, np.ndarray, int], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, np.ndarray, np.ndarray], Metrics]
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(step.AXIS)


@dataclass(frozen=True)
class DataParallel:
    """Devices, and how functions of one device's part of a batch are mapped over them.

    Attributes:
      devices: of all processes; D of them.
      mapping: `pmap`, or its successor `shard_map`.
    """

    devices: tuple[Device, ...]
    mapping: str = "pmap"

    def replicate(self, tree: Tree) -> Tree:
        """Puts a copy of every leaf on every device, once; steps then take it without a transfer."""
        # pmap takes and returns what is on this process's devices, shard_map what is on all.
        return jax.device_put(tree, self._sharding(REPLICATED, self.mapping == "pmap"))

    def make_train_steps(self, task: step.StepConfig) -> TrainSteps:
        """`train_steps` over devices: `(state, data, index (D, K, B / D), count) -> (state, metrics (K,))`.

        Donates the state. Every process gives the same index.
        """
        return self._map(partial(step.train_steps, task), (REPLICATED, REPLICATED, SHARDED, REPLICATED), donate=(0,))

    def make_eval_step(self, task: step.StepConfig) -> EvalStep:
        """`eval_step` over devices: `(variables, data, index (D, B / D), mask (D, B / D)) -> metrics`."""
        return self._map(partial(step.eval_step, task), (REPLICATED, REPLICATED, SHARDED, SHARDED))

    def train_program(self, task: step.StepConfig) -> tuple[Any, tuple[NamedSharding, ...]]:
        """What `make_train_steps` runs under shard_map, to be lowered, and the shardings of its four arguments."""
        return self._program(partial(step.train_steps, task), (REPLICATED, REPLICATED, SHARDED, REPLICATED), (0,))

    def eval_program(self, task: step.StepConfig) -> tuple[Any, tuple[NamedSharding, ...]]:
        """What `make_eval_step` runs under shard_map, to be lowered, and the shardings of its four arguments."""
        return self._program(partial(step.eval_step, task), (REPLICATED, REPLICATED, SHARDED, SHARDED), ())

    def _sharding(self, spec: PartitionSpec, local: bool = False) -> NamedSharding:
        devices = [device for device in self.devices if not local or self._is_mine(device)]
        return NamedSharding(Mesh(np.array(devices), (step.AXIS,)), spec)

    def _is_mine(self, device: Device) -> bool:
        return device.process_index == jax.process_index()

    def _map(self, function: Callable[..., Any], specs: tuple[PartitionSpec, ...], donate: tuple[int, ...] = ()) -> Any:
        mapped = {"pmap": self._pmap, "shard_map": self._shard_map}[self.mapping](function, specs, donate)
        mine = [i for i, device in enumerate(self.devices) if self._is_mine(device)]
        if len(mine) == len(self.devices):
            return mapped

        def with_own_rows(*arguments: Any) -> Any:
            return mapped(*(a[mine] if spec == SHARDED else a for a, spec in zip(arguments, specs, strict=True)))

        return with_own_rows

    def _pmap(self, function: Callable[..., Any], specs: tuple[PartitionSpec, ...], donate: tuple[int, ...]) -> Any:
        return jax.pmap(
            function,
            axis_name=step.AXIS,
            in_axes=tuple(0 if spec == SHARDED else None for spec in specs),
            out_axes=None,  # type: ignore[arg-type]  # None is documented for outputs that are the same everywhere
            donate_argnums=donate,
            devices=self.devices,
        )

    def _program(
        self, function: Callable[..., Any], specs: tuple[PartitionSpec, ...], donate: tuple[int, ...]
    ) -> tuple[Any, tuple[NamedSharding, ...]]:
        def on_a_device(*arguments: Any) -> Any:
            return function(*(a[0] if spec == SHARDED else a for a, spec in zip(arguments, specs, strict=True)))

        # With check_vma the gradient of replicated parameters would come summed over devices already.
        mesh = self._sharding(SHARDED).mesh
        mapped = jax.jit(
            jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False),
            donate_argnums=donate,
        )
        return mapped, tuple(self._sharding(spec) for spec in specs)

    def _shard_map(
        self, function: Callable[..., Any], specs: tuple[PartitionSpec, ...], donate: tuple[int, ...]
    ) -> Any:
        mapped, _ = self._program(function, specs, donate)

        def from_rows(*arguments: Any) -> Any:
            rows = self._sharding(SHARDED)
            placed = (
                jax.make_array_from_process_local_data(rows, a) if spec == SHARDED else a
                for a, spec in zip(arguments, specs, strict=True)
            )
            return mapped(*placed)

        return from_rows
