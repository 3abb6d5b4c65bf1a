"""An identity that tells the compiler in which order an array and its gradient are to lie in memory."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import optimization_barrier

_row_major = Primitive("row_major")
_row_major.def_impl(lambda x: x)
_row_major.def_abstract_eval(lambda x: x)
ad.deflinear(_row_major, lambda cotangent: [row_major(cotangent)])
batching.defvectorized(_row_major)


def row_major(x: jax.Array) -> jax.Array:
    """`x` itself; XLA has to hold it, and its cotangent, in the order of its indices where that saves memory.

    A convolution on a GPU takes its kernel transposed. Left alone, XLA transposes the raw float32 kernel that is there
    anyway, and fuses the optimizer's step with the transposition back, which it then cannot do in place: copies of
    kernels and momenta stand beside the activations. Transposing the cast kernel and its cast gradient costs half.

    An array that is spread over an explicit mesh is left as it is. Where the compiler spreads arrays (a mesh of
    automatic axes), it may gather one for this that is spread along another axis than its first.

    Args:
      x: of any shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> row_major(jnp.arange(3)).tolist()
      [0, 1, 2]
    """
    return _row_major.bind(x)


def _as(x: jax.Array, *shape: int) -> jax.Array:
    spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return x if spread else optimization_barrier(x.reshape(shape)).reshape(x.shape)


def _as_row(x: jax.Array) -> jax.Array:
    return _as(x, -1)


def _as_matrix(x: jax.Array) -> jax.Array:
    return _as(x, -1, x.shape[-1]) if x.ndim > 1 else x


# One axis leaves a GPU's compiler no choice. A TPU's tiles have two, and one axis would make it move everything twice.
mlir.register_lowering(_row_major, mlir.lower_fun(_as_row, multiple_results=False), platform="gpu")
mlir.register_lowering(_row_major, mlir.lower_fun(_as_matrix, multiple_results=False), platform="tpu")
mlir.register_lowering(_row_major, mlir.lower_fun(lambda x: x, multiple_results=False))
