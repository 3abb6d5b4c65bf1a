"""Interception of calls of Flax layers that what JAX traced without it does not escape."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn

_under = jax.make_user_context(())
"""The interceptions around a trace, for JAX's caches: else `nn.jit` would give what it traced without them."""


@contextmanager
def intercept(interceptor: Callable[..., Any], key: Hashable) -> Iterator[None]:
    """`nn.intercept_methods`, and what is traced inside is not taken for what was traced under another `key`.

    Methods of modules without a scope, which have no variables and no path, are not intercepted. Of two modules that
    are alike but for their paths, `nn.jit` takes one's trace for the other's; here each has its own.

    Args:
      interceptor: as `nn.intercept_methods` takes it.
      key: says what the interceptor does.
    """

    def bound_only(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is None:
            return call(*args, **kwargs)
        with _under((*_under.value, context.module.path)):
            return interceptor(call, args, kwargs, context)

    with _under((*_under.value, key)), nn.intercept_methods(bound_only):
        yield
