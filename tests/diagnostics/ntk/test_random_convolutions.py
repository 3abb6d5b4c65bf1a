"""Whatever its convolutions, a network's tangent kernel is the product of its Jacobians, in each of a layer's forms.

`MIMICNORM_TEST_PROGRAMS=1000 pytest -m slow` on this file tries a thousand, in half an hour.
"""

import os
from collections import Counter

import jax
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.diagnostics.ntk import structured_derivatives
from tests.diagnostics.networks import by_output, reference
from tests.diagnostics.ntk.random_convolutions import ConvProgram

pytestmark = pytest.mark.usefixtures("x64")
MANY = int(os.environ.get("MIMICNORM_TEST_PROGRAMS", "24"))
FIRST = int(os.environ.get("MIMICNORM_TEST_FIRST", "1000"))
CHEAPEST = {
    "as it costs": {},
    "pooled": {"pooled_cost": lambda *_: -1.0},
    "factors": {"costs": lambda *_: {"factored": 0.0, "written": 1e99}},
    "written out": {"costs": lambda *_: {"factored": 1e99, "written": 0.0}},
}


def _outcome(seed, form):
    """`agreed`, `refused`, `nothing to compare` or how far off; and what was planned."""
    program = ConvProgram(seed)
    with np.errstate(all="ignore"):
        expected = by_output(reference(program, program.params, program.x))[program.output]
    scale = np.abs(expected).max()
    if not np.isfinite(expected).all() or not 1e-8 < scale < 1e8:
        return program, "nothing to compare", ""
    kernel = EmpiricalNTK(
        program,
        output=program.output,
        implementation="structured_derivatives",
        batch_coupled=program.coupled,
        check=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, cost in CHEAPEST[form].items():
            patch.setattr(structured_derivatives, name, cost)
        detail = kernel.plan(program.params, program.x).detail
        try:
            found = np.asarray(kernel(program.params, program.x))
        except ValueError as error:
            # A maximum's derivative is shared by all that equal it, which are none once XLA rounds it otherwise.
            if "not finite" not in str(error) or program.pool not in ("maximum", "both"):
                raise
            return program, "refused", detail
    error = np.abs(found - expected).max() / scale
    # Roundings of float64; in a random network that divides by a deviation they grow.
    return program, "agreed" if error < 1e-9 else f"off by {error:.2g}", detail


@pytest.mark.parametrize(
    ("seed", "form"),
    [(8, "pooled"), (30, "pooled"), (18, "pooled"), (9, "factors"), (15, "written out"), (23, "as it costs")],
)
def test_random_convolutions(seed, form):
    program, found, detail = _outcome(seed, form)
    assert found == "agreed", program.steps
    assert ("by a column" in detail) == (form == "pooled")


@pytest.mark.slow
def test_many_random_convolutions():
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(FIRST, FIRST + MANY):
        form = list(CHEAPEST)[seed % len(CHEAPEST)]
        program, found, detail = _outcome(seed, form)
        counts[found] += 1
        counts["by a column"] += "by a column" in detail
        if found not in ("agreed", "refused", "nothing to compare"):
            wrong.append((seed, form, found, program.steps))
        if seed % 20 == 19:
            jax.clear_caches()
    print(dict(counts))
    assert not wrong, wrong
    assert counts["agreed"] > MANY / 2
