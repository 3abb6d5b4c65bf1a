"""From PyTorch's layout of an array to Flax's and back."""

import numpy as np


def to_flax(array: np.ndarray, shape: tuple[int, ...], pixels: int = 1) -> np.ndarray:
    """A parameter in Flax's layout.

    Args:
      array: a convolution's weight `(out, in, h, w)`, a dense layer's `(out, in)`, a vector, or one number `(1,)`.
      shape: of the result.
      pixels: of the map whose flattening a dense layer reads, in the order C, H, W there and H, W, C here.

    Returns:
      `(h, w, in, out)`, `(in, out)`, the vector, or `()`.
    """
    if len(shape) == 4:
        return array.transpose(2, 3, 1, 0)
    if len(shape) == 2:
        out, inputs = array.shape
        return array.reshape(out, inputs // pixels, pixels).transpose(2, 1, 0).reshape(inputs, out)
    return array.reshape(shape)


def to_torch(array: np.ndarray, pixels: int = 1) -> np.ndarray:
    """The inverse of `to_flax`, contiguous as PyTorch and safetensors want it."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        inputs, out = array.shape
        array = array.reshape(pixels, inputs // pixels, out).transpose(2, 1, 0).reshape(out, inputs)
    return np.ascontiguousarray(array.reshape(array.shape or (1,)))


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of a parameter of `shape` here.

    Example:
      >>> torch_shape((3, 3, 16, 32)), torch_shape(())
      ((32, 16, 3, 3), (1,))
    """
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] or (1,)
