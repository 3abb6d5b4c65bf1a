"""The data of the theory's figures: lines from `mean_field`, points and samples from random MLPs.

Computations are in JAX's default precision; results are plain NumPy arrays, ready for `plots`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics import unit_diagonal
from mimicnorm_jax.functional.activations import relu
from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.plots import Series
from mimicnorm_jax.theory import random_mlp
from mimicnorm_jax.theory.mean_field import PLAIN, WEIGHT_MEAN, padded
from mimicnorm_jax.theory.random_mlp import KINDS, Params, RandomMLP
from mimicnorm_jax.theory.simulation import (
    Measure,
    condition_numbers,
    cosines,
    equicorrelated,
    inputs_of,
    jacobian,
    sample,
    tangent_kernels,
)

VALID = 4 / 9
"""Fraction of a 3x3 patch that lies inside the image at a corner."""


def transition_maps(key: jax.Array) -> tuple[dict[str, Series], dict[str, Series]]:
    """The paper's Figure 4: by kind, the map of correlations, and simulated points (n = 576, 20 networks each)."""
    names = ("plain", "weight mean", "weight mean, 4/9 of a patch in the image")
    rho = np.linspace(-1, 1, 201)
    theory = (PLAIN, WEIGHT_MEAN, padded(VALID))
    lines = {
        name: Series(rho, np.asarray(each.correlation_map(jnp.asarray(rho))))
        for name, each in zip(names, theory, strict=True)
    }
    starts = np.linspace(-0.8, 0.8, 9)
    makes = (random_mlp.plain, random_mlp.weight_mean, random_mlp.weight_mean)
    points, keys = {}, jax.random.split(key, len(starts))
    for name, make, valid in zip(names, makes, (1.0, 1.0, VALID), strict=True):
        mlp = make(inputs=2, width=576, depth=2, outputs=576)
        measured = [sample(_second_cosine(rho, valid), mlp, each, 20) for rho, each in zip(starts, keys, strict=True)]
        points[name] = _with_errors(starts, measured)
    return lines, points


def _second_cosine(rho: float, valid: float) -> Measure:
    """Cosine after the second layer, of which all but a fraction of the inputs are zeros, as in zero padding."""

    def measure(mlp: RandomMLP, params: Params) -> jax.Array:
        first = mlp.preactivations(params, inputs_of(equicorrelated(2, rho)))[0]
        inside = jnp.arange(mlp.width)[None, :] < round(valid * mlp.width)
        kernel = params["layer2"]
        z = (relu(first) * inside) @ (center(kernel) if mlp.centered else kernel)
        return (z[0] * z[1]).sum() / (jnp.linalg.norm(z[0]) * jnp.linalg.norm(z[1]))

    return measure


def _with_errors(x: np.ndarray, samples: list[np.ndarray]) -> Series:
    """Means and standard errors over networks."""
    errors = [each.std(ddof=1) / len(each) ** 0.5 for each in samples]
    return Series(x, np.array([each.mean() for each in samples]), np.array(errors))


def pair_correlations(key: jax.Array) -> dict[str, np.ndarray]:
    """The paper's App. B.1: by kind, cosines by layer of 210 pairs that start at 0.5, n = 300, `(50, 210)`."""
    pairs = np.triu_indices(21, 1)
    measure = cosines(inputs_of(equicorrelated(21, 0.5)))
    return {
        kind: sample(measure, _hidden(kind, inputs=21, width=300, depth=50), key, 1)[0][:, *pairs] for kind in KINDS
    }


def _hidden(kind: str, inputs: int, width: int, depth: int) -> RandomMLP:
    """An MLP of which the last layer is like the others."""
    mlp = KINDS[kind](inputs, width, depth, width)
    return replace(mlp, last_norm=mlp.normalized)


@dataclass(frozen=True)
class Conditions:
    """Condition numbers of the tangent kernel by depth, each a dict by kind of MLP.

    Attributes:
      limit: at infinite width.
      scaled: means over networks, of the kernel scaled to a unit diagonal.
      raw: the same of the kernel as it is.
    """

    limit: dict[str, Series]
    scaled: dict[str, Series]
    raw: dict[str, Series]


def kernel_conditions(key: jax.Array) -> Conditions:
    """Of 32 inputs of correlation 0.5; 4 networks a point, n = 512 and the mean over 10 outputs."""
    gram, depths, line = equicorrelated(32, 0.5), np.array([2, 4, 8, 16]), np.arange(1, 21)
    limit, scaled, raw = {}, {}, {}
    for kind, theory in (("plain", PLAIN), ("weight mean", WEIGHT_MEAN)):
        kernels = jax.jit(lambda gram, theory=theory: [theory.kernels(gram, depth)[1] for depth in line.tolist()])(gram)
        limit[kind] = Series(line, condition_numbers(kernels))
    for kind, make in KINDS.items():
        kernels = [tangent_kernels(make(32, 512, depth, 10), inputs_of(gram), key, 4) for depth in depths.tolist()]
        raw[kind] = _with_errors(depths, [condition_numbers(each) for each in kernels])
        scaled[kind] = _with_errors(depths, [condition_numbers(unit_diagonal(each)) for each in kernels])
    return Conditions(limit, scaled, raw)


def spectra(key: jax.Array) -> dict[int, np.ndarray]:
    """By number of layers, squared singular values over their mean `(S,)` of the Jacobian of weight mean layers.

    Those of 10 networks of width 512; the half of them that the last ReLU cuts to zero is left out.
    """
    result = {}
    for layers in (1, 2, 4, 8):
        mlp = random_mlp.weight_mean(inputs=1, width=512, depth=layers + 1, outputs=512)
        squares = np.linalg.svd(sample(jacobian, mlp, key, 10), compute_uv=False) ** 2
        relative = squares / squares.mean(1, keepdims=True)
        # The rank is that of the layer with the fewest active units, below half the width.
        result[layers] = relative[relative > 1e-12]
    return result


def marchenko_pastur(x: np.ndarray) -> np.ndarray:
    r"""Density of a ReLU layer's nonzero squared singular values over the mean of all, half of which are zero.

    Marchenko & Pastur (1967) at the ratio 1/2, times 2; for x of any shape.

    $\rho(x) = \sqrt{(b - x)(x - a)} / (2\pi x)$ between $a, b = 2 (1 \mp \sqrt{1/2})^2$: 0.172 and 5.828.
    """
    low, high = (2 * (1 + sign * 0.5**0.5) ** 2 for sign in (-1, 1))
    inside = np.sqrt(np.clip((high - x) * (x - low), 0, None))
    return inside / (2 * np.pi * x)


def activations(key: jax.Array) -> dict[str, np.ndarray]:
    """The paper's Figures 2 and 3: by kind, pre-activations of one network of 51 layers, n = 300, on 1000 inputs.

    Returns:
      `(51, 1000, 300)`.
    """
    kernel_key, input_key = jax.random.split(key)
    x = jax.random.normal(input_key, (1000, 300))

    def measure(mlp: RandomMLP, params: Params) -> jax.Array:
        return jnp.stack(mlp.preactivations(params, x)).astype(jnp.float32)

    return {kind: sample(measure, _hidden(kind, inputs=300, width=300, depth=51), kernel_key, 1)[0] for kind in KINDS}
