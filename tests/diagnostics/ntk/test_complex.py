"""Networks that pass through complex numbers: what a parameter does by them is not lost."""

import jax.numpy as jnp
import pytest
from jax import lax

from mimicnorm_jax.diagnostics import empirical_ntk, nngp
from tests.diagnostics.networks import close, draw, reference

pytestmark = pytest.mark.usefixtures("x64")


def _kernel(change):
    return lambda p, x: jnp.tanh(x @ change(p["w"]) + p["b"][None]) @ p["v"]


def _bias(change):
    return lambda p, x: jnp.tanh(x @ p["w"] + change(p["b"])[None]) @ p["v"]


def _input(change):
    return lambda p, x: jnp.tanh(change(x) @ p["w"] + p["b"][None]) @ p["v"]


FILTER = jnp.array([1.0, 2.0, 0.5, 3.0])
NETWORKS = {
    "spectral norm": _kernel(lambda w: w / jnp.abs(jnp.fft.fft2(w)).max()),
    "spectral radius": _kernel(lambda w: w / jnp.abs(jnp.linalg.eigvals(w)).max()),
    "filtered kernel": _kernel(lambda w: w + jnp.fft.ifft(jnp.fft.fft(w, axis=0) * FILTER[:, None], axis=0).real),
    "modulus": _kernel(lambda w: w * jnp.abs(lax.complex(w, 2 * w)).sum()),
    "phase": _kernel(lambda w: (w * jnp.exp(1j * w.sum())).real),
    "filtered bias": _bias(lambda b: b + jnp.fft.fft(b).real),
    "turned bias": _bias(lambda b: (b * (1 + 2j)).imag),
    "filtered input": _input(lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * FILTER[:3][None], n=4)),
    "padded spectrum": _input(lambda x: jnp.pad(x.astype(complex), ((0, 0), (1, 0))).real[:, :4]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tangent_kernel_by_way_of_complex_numbers_is_that_of_jacobians(name):
    params, x = {"w": draw(0, 4, 4), "v": draw(1, 4, 2), "b": draw(3, 4)}, draw(2, 3, 4)
    expected = reference(NETWORKS[name], params, x)
    close(empirical_ntk(NETWORKS[name], params, x, implementation="structured_derivatives"), expected)
    close(empirical_ntk(NETWORKS[name], params, x, output="trace"), jnp.einsum("nmoo->nm", expected))


def test_activations_behind_a_fourier_transform_are_those_behind_its_matrix():
    params, x = {"w": draw(0, 4, 4), "v": draw(1, 4, 2), "b": draw(3, 4)}, draw(2, 3, 4)

    def transform(x):
        return jnp.fft.irfft(jnp.fft.rfft(x) * FILTER[:3][None], n=4)

    matrix = transform(jnp.eye(4))
    found, expected = (nngp.kernels(_input(one), params, x) for one in (transform, lambda x: x @ matrix))
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        close(ours, theirs)
