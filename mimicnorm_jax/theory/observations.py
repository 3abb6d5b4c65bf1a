"""What is worth seeing in finite MLPs and not promised there: shown beside the checks of `verify`, asserted nowhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.theory import random_mlp
from mimicnorm_jax.theory.checks import Observation, observed
from mimicnorm_jax.theory.mean_field import WEIGHT_MEAN
from mimicnorm_jax.theory.simulation import (
    condition_numbers,
    deep_kernels,
    inputs_of,
    jacobian,
    layer_shares,
    sample,
    tangent_growth,
)


def observe(seed: int) -> list[Observation]:
    """What is worth seeing and not promised at finite width, in double precision."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 4)
        return [*_raw_kernels(keys[0]), *_shares(keys[1]), _total_growth(keys[2]), marchenko_pastur_edge(keys[3])]


def _raw_kernels(key: jax.Array) -> list[Observation]:
    setting, kernels = "n = 256, L = 16, N = 32, 6 seeds", deep_kernels(key)
    remarks = {"plain": f"tends to 1 + N/3 = {1 + 32 / 3:.1f} with depth at infinite width"}
    rows = [
        observed(f"kappa of the NTK as it is, {kind}", setting, condition_numbers(each), remarks.get(kind, ""))
        for kind, each in kernels.items()
    ]
    spread = np.log(np.diagonal(kernels["weight mean"], axis1=1, axis2=2)).var(1, ddof=1) * 256 / 16
    remark = "so a kappa near 1 needs L far below n/4"
    return [*rows, observed("variance of log NTK_ii over L/n, weight mean", setting, spread, remark)]


def _shares(key: jax.Array) -> list[Observation]:
    depth = 5
    mlp = random_mlp.weight_mean(inputs=16, width=256, depth=depth, outputs=1)
    shares = layer_shares(mlp, inputs_of(jnp.eye(16)), key, 10)
    limit = WEIGHT_MEAN.chi() ** np.arange(depth - 1, -1, -1)
    return [
        observed(
            f"share of layer {i + 1} in the NTK's diagonal",
            "n = 256, L = 5, 10 seeds",
            shares[:, i],
            f"{limit[i] / limit.sum():.3f} at infinite width",
        )
        for i in range(depth)
    ]


def _total_growth(key: jax.Array) -> Observation:
    mlp = random_mlp.weight_mean(inputs=16, width=256, depth=24, outputs=256)
    growth = np.log10(sample(tangent_growth, mlp, key, 8)).sum(1)
    remark = f"chi_1^23 = 10^{23 * math.log10(WEIGHT_MEAN.chi()):.2f}"
    return observed("log10 of a tangent's growth, layers 1 to 24", "n = 256, 8 seeds, weight mean", growth, remark)


def marchenko_pastur_edge(key: jax.Array) -> Observation:
    """The largest squared singular value of a layer's Jacobian, over their mean."""
    matrices = sample(jacobian, random_mlp.weight_mean(inputs=1, width=256, depth=2, outputs=256), key, 10)
    squares = np.linalg.svd(matrices, compute_uv=False) ** 2
    remark = f"Marchenko-Pastur edge (1 + sqrt 2)^2 = {(1 + math.sqrt(2)) ** 2:.2f}"
    return observed(
        "largest over mean squared singular value, 1 layer",
        "n = 256, 10 draws",
        squares.max(1) / squares.mean(1),
        remark,
    )
