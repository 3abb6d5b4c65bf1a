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

    Args:
      interceptor: as `nn.intercept_methods` takes it.
      key: says what the interceptor does.
    """
    with _under((*_under.value, key)), nn.intercept_methods(interceptor):
        yield
