"""Which axes of its kernel are fan-in, of each of Flax's layers that has one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from mimicnorm_jax.functional.kernels import Shape
from mimicnorm_jax.functional.layout import KernelLayout

KERNEL_LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Flax's layers with a parameter `kernel`; an attention's are of `nn.DenseGeneral`."""


def _axes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _all_but_last(layer: Any, rank: int, equation: str | None) -> tuple[int, ...]:
    return tuple(range(rank - 1))


def _one_before_last(layer: Any, rank: int, equation: str | None) -> tuple[int, ...]:
    return (rank - 2,)


def _transposed(layer: nn.ConvTranspose, rank: int, equation: str | None) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1) if layer.transpose_kernel else tuple(range(rank - 1))


def _general(layer: nn.DenseGeneral, rank: int, equation: str | None) -> tuple[int, ...]:
    first = len(layer.batch_dims)
    return tuple(range(first, first + len(_axes(layer.axis))))


def _einsum(layer: nn.Einsum, rank: int, equation: str | None) -> tuple[int, ...]:
    operands, _, result = (equation or layer.einsum_str or "").replace(" ", "").partition("->")
    letters = operands.partition(",")[2]
    if len(letters) != rank:  # an ellipsis, or what Flax refuses itself
        raise ValueError(
            f"the fan-in of nn.Einsum {'/'.join(layer.path)} is read from its equation: name every axis of the kernel "
            f"of rank {rank} by a letter; got {equation or layer.einsum_str!r}"
        )
    return tuple(axis for axis, letter in enumerate(letters) if letter not in result)


_FAN_IN: dict[type[nn.Module], Callable[[Any, int, str | None], tuple[int, ...]]] = {
    nn.Conv: _all_but_last,
    nn.ConvLocal: _one_before_last,
    nn.ConvTranspose: _transposed,
    nn.Dense: _all_but_last,
    nn.DenseGeneral: _general,
    nn.Einsum: _einsum,
}


def layout_of(layer: nn.Module, shape: Shape, equation: str | None = None) -> KernelLayout:
    """How a layer reads its kernel.

    Args:
      layer: one of `KERNEL_LAYERS`, or what derives from one.
      shape: of the kernel.
      equation: of an `nn.Einsum`, where its call says it.

    Raises:
      ValueError: for another layer, and for an equation that does not name each axis of the kernel.

    Example:
      >>> layout_of(nn.ConvTranspose(4, (3,), transpose_kernel=True), (3, 4, 8)).fan_in
      (0, 2)
    """
    for known, fan_in in _FAN_IN.items():
        if isinstance(layer, known):
            groups = getattr(layer, "feature_group_count", 1)
            return KernelLayout(tuple(shape), fan_in(layer, len(shape), equation), groups)
    names = ", ".join(f"nn.{known.__name__}" for known in _FAN_IN)
    raise ValueError(f"the fan-in is known of {names}; got {type(layer).__name__}")


def equation_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The equation in a call's arguments, of an `nn.Einsum`; None if it has none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), None)
