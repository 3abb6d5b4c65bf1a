"""Centering of whole parameter trees, outside of the layers: once, or after every optimizer step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.functional.transform import CENTER_PUBLISHED, KernelFunction, KernelTransform
from mimicnorm_jax.optim.groups import is_group
from mimicnorm_jax.utils.trees import leaf_names

Select = Callable[[tuple[str, ...], jax.Array], bool | KernelFunction]
"""Whether to center the leaf at this path of a parameter tree, or what to do with it in place of `center`, such as
`jax.vmap(center)` where the kernels of a scanned layer are stacked along the first axis."""


class _ConvKernels(NamedTuple):
    transform: KernelTransform
    window: int | None

    def __call__(self, path: tuple[str, ...], leaf: jax.Array) -> bool:
        if path[-1:] != ("kernel",) or leaf.ndim < 3 or not self.transform.takes(leaf.shape):
            return False
        if self.window is None and leaf.ndim != 4:
            raise ValueError(_doubt(path, leaf, f"has rank {leaf.ndim}, not a 2-D convolution's 4"))
        return leaf.ndim == (self.window or 2) + 2


def _doubt(path: tuple[str, ...], leaf: jax.Array, why: str) -> str:
    return (
        f"{'/'.join(path)} of shape {leaf.shape} {why}: kernels of convolutions, of attention and stacks of them look "
        "alike. Say select=select_conv_kernels(window=2) if exactly the kernels of rank 4 are of (2-D) convolutions; "
        "or let select=select_convolutions(module, inputs) read it from the module"
    )


def select_conv_kernels(transform: KernelTransform = CENTER_PUBLISHED, *, window: int | None = None) -> Select:
    """Selects the leaves named `kernel` that `transform` takes, from rank and shape alone.

    A tree tells neither a layer's groups, so its rule is asked with `groups=1`, nor convolutions from other layers with
    kernels of rank 3 and more (attention), nor a kernel from a scanned layer's stack of kernels.
    `select_convolutions` and `select_kernels` read all that from the module.

    Args:
      transform: what to do with which kernels.
      window: says that the kernels of rank `window + 2` are those of convolutions with so many spatial axes, and no
        others. None says nothing: kernels of rank 4 count as 2-D convolutions if a bias `(n_out,)` stands beside
        them, and for any other kernel of rank 3 and more `center_params` raises ValueError.
    """
    return _ConvKernels(transform, window)


def center_params(params: optax.Params, select: Select | None = None) -> optax.Params:
    """Centers the selected leaves of a parameter tree, or does to them what `select` returns or was given.

    Args:
      params: any tree of arrays, boxed (`nn.Partitioned`) or not.
      select: which leaves, by default `select_conv_kernels()`.

    Returns:
      A tree of the same structure; leaves that are not selected are passed through.

    Raises:
      ValueError: for a leaf that `select_conv_kernels()` cannot tell, for a tree that is neither empty nor a group of
        `optax.masked` or `partition` and has no leaf of the name by which it selects, and for a selected `kernel` whose
        bias beside it is not `(n_out,)`: its axes but the last are not fan-in.
    """
    select = select or select_conv_kernels()
    by_path = {leaf_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    named = {"/".join(path[-1:]) for path in by_path}
    if isinstance(select, _ConvKernels) and named and "kernel" not in named and not is_group(params):
        raise ValueError(
            f"no leaf is named 'kernel', as Flax names them; there are {', '.join(sorted(named))}: give a select of "
            "your own, which says what to do with which leaf"
        )

    def projected(names: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        chosen = select(names, leaf)
        if callable(chosen):
            return chosen(leaf)
        if not chosen:
            return leaf
        bias = by_path.get((*names[:-1], "bias")) if names[-1:] == ("kernel",) else None
        if bias is not None and bias.shape != (leaf.shape[-1],):
            raise ValueError(_doubt(names, leaf, f"has a bias {bias.shape} beside it, not ({leaf.shape[-1]},)"))
        if bias is None and isinstance(select, _ConvKernels) and select.window is None:
            raise ValueError(_doubt(names, leaf, "has no bias beside it that would tell"))
        return select.transform(leaf) if isinstance(select, _ConvKernels) else center(leaf)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: projected(leaf_names(path), leaf), params)


def keep_kernels_centered(select: Select | None = None) -> optax.GradientTransformation:
    """Keeps the selected kernels centered after every optimizer step, as the published code does.

    Put it last in an `optax.chain`, and start from `center_params(params, select)`. For SGD with momentum, Nesterov and
    coupled weight decay the trajectory is then that of centering inside the layer (from kernels that are not centered
    the first gradient is another network's, and momentum keeps it); for Adam, AdamW and clipped gradients it is a
    different algorithm, because those see the gradient before it is projected.

    Args:
      select: which leaves, by default `select_conv_kernels()`.

    Returns:
      A transformation whose `update` needs `params`; it raises ValueError without them, and where `center_params` does.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("keep_kernels_centered needs the parameters: call update(grads, state, params)")
        centered = center_params(optax.apply_updates(params, updates), select)
        return jax.tree.map(jnp.subtract, centered, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
