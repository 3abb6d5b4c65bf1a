"""What tells the computation of one kernel from that of any other."""

import hashlib
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.jaxprs import programs


def digest_of(programs: list[core.ClosedJaxpr], arrays: Any, *others: Any) -> str:
    """A digest of programs, with the arrays that they close over, of their arguments and of what else counts."""
    about = others, jax.__version__, jax.local_devices()[0].device_kind, os.environ.get("XLA_FLAGS")
    digest = hashlib.sha256(repr(about).encode())
    for program in programs:
        digest.update(re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
        for constant in _constants(program):
            _add(digest, constant)
    for leaf in jax.tree.leaves(arrays):
        _add(digest, leaf)
    return digest.hexdigest()


def bytes_of(array: np.ndarray) -> memoryview:
    """An array's bytes, without a copy where they lie in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _add(digest: Any, array: Any) -> None:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    digest.update(f"{host.shape}{host.dtype}".encode())
    digest.update(bytes_of(host))


def _constants(program: core.ClosedJaxpr) -> list[Any]:
    found = list(program.consts)
    for equation in program.jaxpr.eqns:
        for value in equation.params.values():
            for inner in programs(value):
                found += _constants(inner)
    return found
