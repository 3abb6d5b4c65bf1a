"""Kernels of constant norm: LAWN and Hyperball around any optimizer of Optax.

Behind a normalization the scale of a kernel does not change the function, only how far a step turns it. These two keep
the scale and leave the turning to the learning rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mimicnorm_jax.optim.groups import is_group
from mimicnorm_jax.utils.trees import leaf_names

SelectNorm = Callable[[tuple[str, ...], jax.Array], bool | tuple[int, ...]]
"""Whether the norm of the leaf at this path of a parameter tree is kept; or along which axes it is a stack of kernels
that keep a norm each, such as `(0,)` for those of a scanned layer."""


def select_all_kernels(path: tuple[str, ...], leaf: jax.Array) -> bool:
    """Leaves named `kernel` of rank 2 and more, each as one; biases and scalars are left alone.

    No tree tells a stack of kernels (`nn.scan`, `nn.vmap`) from a kernel: where there are such, give a select of your
    own, which returns the stack's axes; else their layers share one norm.

    Args:
      path: of a parameter.
      leaf: the parameter, of any shape.
    """
    return path[-1:] == ("kernel",) and leaf.ndim >= 2


class FixedNormState(NamedTuple):
    """State of `lawn` and `hyperball`.

    Attributes:
      num_steps: done, int32.
      norms: the Frobenius norm that each selected leaf keeps, 0 for the others and for those that keep none; of a stack
        its kernels', with axes of length 1 for theirs.
      inner: the inner optimizer's.
    """

    num_steps: jax.Array
    norms: Any
    inner: optax.OptState


def _dot(a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inner product, in at least float32: one number, or a stack's in a shape that is 1 along its kernels."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    product = a.astype(dtype) * b.astype(dtype)
    if not shape:
        return jnp.sum(product)
    return jnp.sum(product, [axis for axis, side in enumerate(shape) if side == 1], keepdims=True)


def _norm(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The Frobenius norm, in the shape of `_dot`."""
    return jnp.sqrt(_dot(leaf, leaf, shape))


def _kept_shape(leaf: jax.Array, stack: bool | tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(stack, tuple):
        return ()
    axes = [axis % leaf.ndim for axis in stack]
    return tuple(side if axis in axes else 1 for axis, side in enumerate(leaf.shape))


def _tangent(vector: jax.Array, leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector without its part along a leaf; zero leaves have none."""
    square = _dot(leaf, leaf, shape)
    part = _dot(vector, leaf, shape) / jnp.where(square == 0, 1, square)
    return (vector - part * leaf).astype(vector.dtype)


def _scaled(vector: jax.Array, to: jax.Array) -> jax.Array:
    length = _norm(vector, to.shape)
    return (vector * (to / jnp.where(length == 0, 1, length))).astype(vector.dtype)


def _map(select: SelectNorm, function: Callable[..., Any], otherwise: Callable[..., Any], *trees: Any) -> Any:
    """Applies one function to the leaves whose norm is kept, another to the rest; the last tree is the parameters'."""

    def at(path: Any, *leaves: Any) -> Any:
        return function(*leaves) if select(leaf_names(path), leaves[-1]) else otherwise(*leaves)

    return jax.tree_util.tree_map_with_path(at, *trees)


def _refuse_other_names(select: SelectNorm, params: optax.Params) -> None:
    """Raises ValueError where the default selection finds nothing in a whole tree that holds matrices."""
    if select is not select_all_kernels or is_group(params):
        return
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    matrices = ["/".join(leaf_names(path)) for path, leaf in flat if leaf.ndim >= 2]
    if matrices and not any(select(leaf_names(path), leaf) for path, leaf in flat):
        raise ValueError(
            f"no leaf is named 'kernel', as Flax names them; of rank 2 and more are {', '.join(matrices[:5])}: give a "
            "select of your own, which says whose norm is kept"
        )


def _norms(select: SelectNorm, params: optax.Params) -> Any:
    _refuse_other_names(select, params)

    def first(path: Any, leaf: jax.Array) -> jax.Array:
        stack = select(leaf_names(path), leaf)
        if not stack:
            return jnp.zeros((), jnp.promote_types(leaf.dtype, jnp.float32))
        return _norm(leaf, _kept_shape(leaf, stack))

    return jax.tree_util.tree_map_with_path(first, params)


def _required(params: optax.Params | None, name: str) -> optax.Params:
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(grads, state, params)")
    return params


def lawn(
    inner: optax.GradientTransformation,
    free_steps: int,
    select: SelectNorm | None = None,
    *,
    project_direction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Logit Attenuating Weight Normalization (Gupta et al. 2021, arXiv 2108.05839) around an optimizer.

    For `free_steps` steps the inner optimizer works as it is. Then the norm of every selected leaf is frozen: its
    gradient loses the part along the leaf before the inner optimizer sees it, and after the step the leaf is scaled
    back. A leaf that is zero then has no norm to keep: it stays free.
    Whether the published code projects the inner optimizer's direction once more is not known to us: an option.

    Args:
      inner: with its learning rate, and without weight decay on the selected leaves.
      free_steps: length of the free phase, at least 0.
      select: whose norm is frozen; default: `select_all_kernels`.
      project_direction: whether the inner optimizer's update loses its part along the leaf too.

    Returns:
      A transformation whose `update` needs `params`, and passes what else it is given on to the inner optimizer; it
      raises ValueError without them. Its `init` does where the
      default `select` finds no kernel in a tree that holds matrices and is no group of `optax.masked` or `partition`.

    Raises:
      ValueError: for a negative number of free steps.
    """
    # `optax.inject_hyperparams` gives numbers as arrays.
    if not isinstance(free_steps, jax.Array) and free_steps < 0:
        raise ValueError(f"free_steps is {free_steps}: a phase has at least 0 steps")
    select, inner = select or select_all_kernels, optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> FixedNormState:
        return FixedNormState(jnp.zeros((), jnp.int32), _norms(select, params), inner.init(params))

    def update(
        updates: optax.Updates, state: FixedNormState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, FixedNormState]:
        params = _required(params, "lawn")
        frozen = state.num_steps >= free_steps
        # Until the phase ends the norms follow the leaves.
        norms = _map(
            select,
            lambda kept, leaf: jnp.where(state.num_steps > free_steps, kept, _norm(leaf, kept.shape)),
            lambda kept, leaf: kept,
            state.norms,
            params,
        )

        def projected(vector: jax.Array, kept: jax.Array, leaf: jax.Array) -> jax.Array:
            return jnp.where(frozen & (kept > 0), _tangent(vector, leaf, kept.shape), vector)

        def back(step: jax.Array, kept: jax.Array, leaf: jax.Array) -> jax.Array:
            return jnp.where(frozen & (kept > 0), _scaled(leaf + step, kept) - leaf, step)

        updates = _map(select, projected, lambda vector, kept, leaf: vector, updates, norms, params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        if project_direction:
            updates = _map(select, projected, lambda vector, kept, leaf: vector, updates, norms, params)
        updates = _map(select, back, lambda step, kept, leaf: step, updates, norms, params)
        return updates, FixedNormState(jnp.asarray(optax.safe_increment(state.num_steps)), norms, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  # a state of our own


def hyperball(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    select: SelectNorm | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates of fixed norm (Hyperball, arXiv 2606.16899), without weight decay.

    A selected leaf W of initial norm R becomes $R\, n(W - \eta R\, n(u))$ with $n(v) = v / |v|$ and the direction u of
    an optimizer: $\eta$ is the tangent of the angle of a step where u is perpendicular to W. Other leaves, and those
    that start at zero, take $-\eta u$.

    Args:
      direction: such as `optax.scale_by_adam()`, without a learning rate.
      learning_rate: $\eta$, or a schedule of it.
      select: whose norm is kept; default: `select_all_kernels`.

    Returns:
      A transformation whose `update` and `init` are called and raise as those of `lawn`.
    """
    select, direction = select or select_all_kernels, optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> FixedNormState:
        return FixedNormState(jnp.zeros((), jnp.int32), _norms(select, params), direction.init(params))

    def update(
        updates: optax.Updates, state: FixedNormState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, FixedNormState]:
        params = _required(params, "hyperball")
        rate = jnp.asarray(learning_rate(state.num_steps) if callable(learning_rate) else learning_rate)
        updates, inner_state = direction.update(updates, state.inner, params, **extra)

        def turned(u: jax.Array, kept: jax.Array, leaf: jax.Array) -> jax.Array:
            kept_norm = _scaled(leaf - rate * _scaled(u, kept), kept) - leaf
            return jnp.where(kept > 0, kept_norm, plain(u, kept, leaf))

        def plain(u: jax.Array, kept: jax.Array, leaf: jax.Array) -> jax.Array:
            return (-rate * u).astype(u.dtype)

        updates = _map(select, turned, plain, updates, state.norms, params)
        return updates, FixedNormState(jnp.asarray(optax.safe_increment(state.num_steps)), state.norms, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  # a state of our own
