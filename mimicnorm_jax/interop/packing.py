"""How small a binary network is where each binary weight is kept as one bit."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from mimicnorm_jax.functional.binary import binarize
from mimicnorm_jax.functional.transform import KernelTransform
from mimicnorm_jax.linen.selection import LayerKernel, find_kernels


class PackedSize(NamedTuple):
    """Bytes of a network's parameters and running averages.

    Attributes:
      binary_weights: how many weights are read as signs.
      binary_bytes: of their bits, each kernel in whole bytes, and of one number for each of its output channels.
      other_bytes: of all that is not such a kernel, as it is stored.
      stored_bytes: of everything as it is stored, in training.
    """

    binary_weights: int
    binary_bytes: int
    other_bytes: int
    stored_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Of the packed network."""
        return self.binary_bytes + self.other_bytes


def packed_size(model: nn.Module, image_shape: tuple[int, ...]) -> PackedSize:
    """What a network takes whose layers read some kernels through `functional.binarize`; nothing is computed.

    Args:
      model: from `models.create`, or any with such layers.
      image_shape: that it takes, `(H, W, C)`.

    Example:
      >>> from mimicnorm_jax import models
      >>> size = packed_size(models.create("reactnet8", method="bnn_mimic"), (32, 32, 3))
      >>> size.binary_weights, round(size.stored_bytes / size.packed_bytes, 1)
      (76288, 7.9)
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
    leaves: list[Any] = jax.tree.leaves(variables)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    params: dict[tuple[str, ...], Any] = flatten_dict(variables["params"])
    binary = [(params[path], kernel) for path, kernel in find_kernels(model, image).items() if reads_signs(kernel)]
    packed = sum(_packed(leaf, kernel) for leaf, kernel in binary)
    others = stored - sum(leaf.size * leaf.dtype.itemsize for leaf, _ in binary)
    return PackedSize(sum(leaf.size for leaf, _ in binary), packed, others, stored)


def _packed(leaf: Any, kernel: LayerKernel) -> int:
    """Bytes of the kernels of a leaf, of which scanned layers stack several."""
    size = math.prod(kernel.layout.shape)
    return leaf.size // size * (math.ceil(size / 8) + leaf.dtype.itemsize * kernel.layout.flat_shape[-1])


def reads_signs(kernel: LayerKernel) -> bool:
    """Whether a layer reads its kernel as a number a channel times signs: binarized by what comes last."""
    return _last(kernel.transform).function is binarize and kernel.layout.takes(_last(kernel.transform))


def _last(transform: KernelTransform) -> KernelTransform:
    return _last(transform.then[-1]) if transform.then else transform
