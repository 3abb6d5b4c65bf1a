"""Interception of calls of Flax layers that what JAX traced without it does not escape."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
from flax import linen as nn

_under = jax.make_user_context(())
"""The interceptions around a trace, for JAX's caches: else `nn.jit` would give what it traced without them."""


@contextmanager
def intercept(interceptor: Callable[..., Any], key: Hashable) -> Iterator[None]:
    """`nn.intercept_methods`, and what is traced inside is not taken for what was traced under another `key`.

    Methods of modules without a scope, which have no variables and no path, are not intercepted. Of two modules that
    are alike but for their paths `nn.jit` traces one and takes it for the other: what is done must not depend on paths.

    Args:
      interceptor: as `nn.intercept_methods` takes it.
      key: says what the interceptor does.
    """
    with _under((*_under.value, key)), nn.intercept_methods(partial(_bound_only, interceptor)):
        yield


@contextmanager
def observe(interceptor: Callable[..., Any]) -> Iterator[None]:
    """`intercept` of every call, for what looks at a network once: nothing that is traced inside is used again."""
    before = _under.value
    with ExitStack() as stack:

        def anew(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            stack.enter_context(_under((*before, object())))
            return interceptor(call, args, kwargs, context)

        stack.enter_context(_under((*before, object())))
        stack.enter_context(nn.intercept_methods(partial(_bound_only, anew)))
        yield


def _bound_only(interceptor: Callable[..., Any], call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    return call(*args, **kwargs) if context.module.scope is None else interceptor(call, args, kwargs, context)
