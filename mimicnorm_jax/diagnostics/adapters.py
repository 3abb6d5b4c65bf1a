"""A Flax module with variables as the pure function that the diagnostics take."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


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
      ValueError: if there are no parameters in `variables`.

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

    def keep(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        # One key alone is Flax's default for every collection.
        named = not isinstance(given, Mapping) or getattr(context.module, "rng_collection", "") in given
        return args[0] if isinstance(context.module, nn.Dropout) and not named else call(*args, **kwargs)

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        with nn.intercept_methods(keep):
            result: Any = module.apply({"params": params, **fixed}, x, **kwargs)
        return result[0] if kwargs.get("mutable") else result

    return apply_fn, variables["params"]
