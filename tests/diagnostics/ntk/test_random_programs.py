"""Whatever the network, its tangent kernel by every implementation is the product of its Jacobians, or refused.

`MIMICNORM_TEST_PROGRAMS=1000 pytest -m slow` on this file tries a thousand, in an hour; with MIMICNORM_TEST_FIRST=1600
and 400 of them the last 400 of these.
"""

import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.diagnostics.ntk import structured_derivatives
from mimicnorm_jax.diagnostics.tracing import independence, jaxprs
from tests.conftest import QUICKLY
from tests.diagnostics.ntk.random_programs import Program

pytestmark = pytest.mark.usefixtures("x64")
MANY = int(os.environ.get("MIMICNORM_TEST_PROGRAMS", "25"))
FIRST = int(os.environ.get("MIMICNORM_TEST_FIRST", "1000"))
REFUSALS = ("influence one another", "outputs differ by", "ntk_vector_products' needs forward-mode", "not finite")


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Most of a small program's time is the compiler's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICKLY)


def _reference(program):
    """The product of the whole batch's Jacobians."""
    total = 0.0
    for leaf in jax.tree.leaves(jax.jit(jax.jacrev(program))(program.params, program.x)):
        rows = np.asarray(leaf.astype(jnp.float64)).reshape(*leaf.shape[:2], -1)
        total = total + np.einsum("nok,mpk->nmop", rows, rows)
    return total


def _tolerance(program):
    eps = jaxprs.coarsest(jax.make_jaxpr(program)(program.params, program.x))
    # Of a kernel of half precision, every derivative is rounded, by JAX and by us at different places.
    return max(independence.tolerance(eps), 1e-9)


def outcome(seed, implementations=("structured_derivatives", "ntk_vector_products", "auto")):
    """By implementation, `agreed`, `refused` or how far off; and whether there is anything to compare."""
    program = Program(seed)
    with np.errstate(all="ignore"):
        expected = _reference(program)
    scale = np.abs(expected).max()
    if not np.isfinite(expected).all() or not 1e-6 < scale < 1e6:
        return program, {}
    found, planned = {}, ""
    for implementation in implementations:
        try:
            kernel = EmpiricalNTK(program, implementation=implementation, check=False)
            if implementation == "auto" and kernel.plan(program.params, program.x).implementation == planned:
                found[implementation] = found[planned]
                continue
            error = np.abs(np.asarray(kernel(program.params, program.x)) - expected).max() / scale
            planned = implementation if implementation == "structured_derivatives" else planned
            found[implementation] = "agreed" if error <= _tolerance(program) else f"off by {error:.2g}"
        except ValueError as error:
            if not any(reason in str(error) for reason in REFUSALS):
                raise
            found[implementation] = "refused"
    return program, found


@pytest.fixture
def factors(monkeypatch):
    """Makes factors the cheapest, so that all that is known of kernels and loops is used."""

    def always() -> None:
        monkeypatch.setattr(structured_derivatives, "costs", lambda *_: {"factored": 0.0, "written": 1e99})

    return always


@pytest.mark.parametrize("seed", [*range(8), 1996])
def test_random_programs(seed):
    program, found = outcome(seed)
    wrong = {name: what for name, what in found.items() if what not in ("agreed", "refused")}
    assert not wrong, program.steps


@pytest.mark.parametrize("seed", range(8, 11))
def test_random_programs_from_factors(seed, factors):
    factors()
    program, found = outcome(seed, ("structured_derivatives",))
    assert set(found.values()) <= {"agreed", "refused"}, program.steps


@pytest.mark.slow
def test_many_random_programs(factors):
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(FIRST, FIRST + MANY):
        if seed == FIRST + MANY // 2:
            factors()
        program, found = outcome(seed)
        counts.update(f"{name} {what.split()[0]}" for name, what in found.items())
        counts["nothing to compare"] += not found
        wrong += [(seed, found, program.steps) for what in found.values() if what not in ("agreed", "refused")]
        if seed % 20 == 19:
            jax.clear_caches()
    print(dict(counts))
    assert not wrong, wrong
    assert counts["structured_derivatives agreed"] > MANY / 2
