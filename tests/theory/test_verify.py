"""`verify` passes on the theory's networks, and fails on networks that break it."""

import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from mimicnorm_jax.theory import S, checks, figures, observations, random_mlp, verify

once = pytest.mark.xdist_group("report")
"""With `--dist loadgroup` in one process, which makes the report once."""


@pytest.fixture(scope="module")
def report():
    return verify.run(0)


@once
@pytest.mark.slow
def test_every_row_passes_and_leaves_the_precision_alone(report):
    assert [row for row in report if not row.passed] == []
    assert not jax.config.jax_enable_x64
    # Double precision: in single it is 1e-8 at best.
    (exact,) = (row for row in report if row.name.startswith("column sums"))
    assert exact.measured < 1e-13


def _again(check):
    with jax.enable_x64(True):
        return check(jax.random.fold_in(jax.random.key(0), verify.CHECKS.index(check)))


@once
@pytest.mark.slow
def test_rows_are_reproducible_and_survive_json(report):
    (again,) = _again(verify.layer_jacobian)
    with jax.enable_x64(True):
        (other,) = verify.layer_jacobian(jax.random.key(1))
    assert again in report
    assert other.measured != again.measured
    assert [checks.Check(**row) for row in json.loads(json.dumps([asdict(row) for row in report]))] == report


@once
@pytest.mark.slow
def test_forgetting_the_exact_fan_in_fails_the_energy_row(report, monkeypatch):
    exact = random_mlp.weight_mean
    monkeypatch.setattr(random_mlp, "weight_mean", lambda **sizes: replace(exact(**sizes), weight_variance=2 / S))
    (row,), (right,) = _again(verify.energy), [row for row in report if row.name.startswith("energy")]
    # On the same draws: n / (n - 1) is missing from each of eight layers.
    np.testing.assert_allclose(row.measured / right.measured, (63 / 64) ** 8, rtol=1e-9)
    assert not row.passed


@pytest.mark.slow
def test_uncentered_kernels_fail_the_rows_on_correlations(monkeypatch):
    exact = random_mlp.weight_mean
    monkeypatch.setattr(random_mlp, "weight_mean", lambda **sizes: replace(exact(**sizes), centered=False))
    with jax.enable_x64(True):
        half, nine_tenths, spread = verify.correlations(jax.random.key(0))
    assert not half.passed
    assert not spread.passed
    # A plain layer raises correlations.
    assert half.measured > 0.5
    assert nine_tenths.measured > 0.9


def test_bounds_and_tolerances():
    assert checks.expect_close("", "", np.array([0.9, 1.3]), 1.0, 0.1).passed
    assert not checks.expect_close("", "", np.array([0.9, 1.31]), 1.0, 0.1).passed
    assert checks.expect_between("", "", 15.1, low=15).passed
    assert not checks.expect_between("", "", 14.9, low=15).passed
    assert not checks.expect_between("", "", 11.1, low=6, high=11).passed
    assert not checks.expect_between("", "", float("nan"), high=1).passed
    assert not checks.expect_between("", "", float("inf"), low=15).passed
    row = checks.expect_close("", "", np.array([1.0, 2.0, 3.0]), 2.0, 0.1)
    np.testing.assert_allclose(row.standard_error, 1 / 3**0.5)


def test_table_shows_failures_bounds_and_errors():
    slope, kappa = checks.as_table(
        [
            checks.expect_close("slope", "n = 8", np.array([1.49, 1.53]), 1.5, 0.18),
            checks.expect_between("kappa", "deep", 20.0, low=6, high=11),
        ]
    ).splitlines()[1:]
    assert slope.split() == ["slope", "n", "=", "8", "1.50", "±", "0.18", "1.510", "±", "0.020", "ok"]
    assert kappa.split() == ["kappa", "deep", "6", "to", "11", "20", "FAILED"]
    assert [slope.index(word) for word in ("n =", "1.50", "1.510", "ok")] == [
        kappa.index(word) for word in ("deep", "6 to", "20", "FAILED")
    ]


def test_observed_edge_is_marchenko_pastur_s():
    with jax.enable_x64(True):
        edge = observations.marchenko_pastur_edge(jax.random.key(0))
    # At width 256 the largest eigenvalue lies below the edge by about 256^(-2/3) of it.
    assert 0.94 < edge.measured / (1 + 2**0.5) ** 2 < 1.02
    x = np.linspace(1e-4, 7, 200_001)
    density = figures.marchenko_pastur(x)
    np.testing.assert_allclose(np.trapezoid(density, x), 1, atol=1e-4)
    # Half of all squared singular values are zero, so the mean of the others is 2.
    np.testing.assert_allclose(np.trapezoid(density * x, x), 2, atol=1e-4)
    np.testing.assert_allclose(x[density > 0][-1], (1 + 2**0.5) ** 2, atol=1e-4)
