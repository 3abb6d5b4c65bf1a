"""Modules of Linen, NNX and Equinox as the pure function that the diagnostics take, and what they still need said."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx

from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn
from mimicnorm_jax.linen import Dropout
from mimicnorm_jax.linen.interception import intercept


def from_linen(module: nn.Module, variables: Mapping[str, Any], **kwargs: Any) -> tuple[ApplyFn, Any]:
    """Splits a module into `apply_fn(params, x)` and `params`.

    Other collections (running averages) are held fixed. With `train=True`, or whatever makes a module normalize by
    its batch, pass `mutable=["batch_stats"]`; its updates are dropped, and the batch is then coupled: see
    `batch_coupled` in `diagnostics`. Dropout does nothing unless the random numbers of its collection are given, in any
    mode; with them a batch's mask depends on the place in the batch.

    Args:
      module: any linen module, ours or not.
      variables: as `module.init` returns them.
      **kwargs: for `module.apply`, such as `train=False`, `rngs=...` or `mutable=...`.

    Raises:
      ValueError: if there are no parameters in `variables`. The function raises it where the module asks for random
        numbers or writes to a collection that it was not given.

    Example:
      >>> module = nn.Dense(2)
      >>> variables = module.init(jax.random.key(0), jax.numpy.ones((1, 3)))
      >>> apply_fn, params = from_linen(module, variables)
      >>> apply_fn(params, jax.numpy.ones((4, 3))).shape
      (4, 2)
    """
    if not isinstance(module, nn.Module) or not isinstance(variables, Mapping):
        raise ValueError(
            f"from_linen takes a linen module and its variables, not a {type(module).__name__} and a "
            f"{type(variables).__name__}"
        )
    if "params" not in variables:
        raise ValueError(f"variables hold {', '.join(variables) or 'nothing'}, no 'params': pass what init returned")
    fixed = {name: value for name, value in variables.items() if name != "params"}

    given = {} if kwargs.get("rngs") is None else kwargs["rngs"]
    key = ("from_linen", frozenset(given) if isinstance(given, Mapping) else None)
    has_updates = kwargs.get("mutable", False) is not False  # Flax returns them for an empty list too

    def keep(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        # One key alone is Flax's default for every collection.
        named = not isinstance(given, Mapping) or getattr(context.module, "rng_collection", "dropout") in given
        drops = isinstance(context.module, nn.Dropout | Dropout) and context.method_name == "__call__"
        if not drops or named:
            return call(*args, **kwargs)
        return args[0] if args else kwargs["inputs" if isinstance(context.module, nn.Dropout) else "x"]

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        with intercept(keep, key), _needs_named():
            result: Any = module.apply({"params": params, **fixed}, x, **kwargs)
        return result[0] if has_updates else result

    return apply_fn, variables["params"]


@contextmanager
def _needs_named() -> Iterator[None]:
    """Says what to give to `from_linen` where a module misses random numbers, or may not write to a collection."""
    try:
        yield
    except flax_errors.InvalidRngError as error:
        raise ValueError(
            f"the module asks for random numbers that it was not given ({_first_line(error)}): pass "
            "from_linen(..., rngs={'NAME': key}), which fixes them, or the argument that makes it deterministic"
        ) from error
    except flax_errors.ModifyScopeVariableError as error:
        raise ValueError(
            f"the module writes to a collection that is held fixed ({_first_line(error)}): pass "
            "from_linen(..., mutable=['NAME']), whose updates are dropped, or the argument by which it only reads it, "
            "such as train=False; a BatchNorm that writes couples its batch (see batch_coupled)"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split(" (https", maxsplit=1)[0].splitlines()[0]


def from_nnx(model: nnx.Module, **kwargs: Any) -> tuple[ApplyFn, Any]:
    """Splits an NNX model into `apply_fn(params, x)` and `params`, the state of its `nnx.Param`s.

    All other state (running averages, random streams and their counts) is held fixed as it is now: each call starts
    from it, and what the call changes is dropped. So a Dropout that is on draws the same mask each time, by place in
    the batch, which is refused as coupled examples are: `model.eval()` first. A BatchNorm in training mode couples its
    batch: see `batch_coupled` in `diagnostics`.

    Args:
      model: any NNX module, ours or not; it is not changed.
      **kwargs: for its call, such as `train=False`.

    Raises:
      ValueError: if it is no NNX module, or has no parameters.

    Example:
      >>> apply_fn, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> apply_fn(params, jax.numpy.ones((4, 3))).shape
      (4, 2)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"from_nnx takes an NNX module, not a {type(model).__name__}")
    graph, params, others = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"the {type(model).__name__} holds no nnx.Param to differentiate by")

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        called: Any = nnx.merge(graph, params, others, copy=True)
        return called(x, **kwargs)

    return apply_fn, params


def from_equinox(model: Any, *, state: Any = None) -> tuple[ApplyFn, Any]:
    """An Equinox model, which is a function of one example, as one of a batch; its parameters are the model itself.

    Leaves that are not floating-point arrays are held fixed. `equinox.nn.inference_mode(model)` switches Dropout off
    and has BatchNorm read its running averages; a BatchNorm in training mode couples its batch, and what it writes to
    the state is dropped.

    Args:
      model: a callable `equinox.Module` of one input, and of the state if there is one.
      state: what `equinox.nn.make_with_state` returned beside it, held fixed.

    Raises:
      ValueError: if it is no callable Equinox module. The function raises it where the model asks for a key.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None or not isinstance(model, equinox.Module) or not callable(model):
        raise ValueError(f"from_equinox takes a callable equinox.Module, not a {type(model).__name__}")

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        try:
            if state is None:
                return jax.vmap(params)(x)
            fresh = jax.tree.map(lambda leaf: leaf, state)  # Equinox lets no state be used twice, but for copies
            return jax.vmap(lambda one: params(one, fresh), axis_name="batch", out_axes=(0, None))(x)[0]
        except (RuntimeError, TypeError) as error:
            if not re.search(r"\bkey\b", str(error)):
                raise
            raise ValueError(
                f"the model asks for random numbers ({error}): take equinox.nn.inference_mode(model), or bind a key "
                "into its call"
            ) from error

    return apply_fn, model
