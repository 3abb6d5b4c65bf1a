"""The theory of `mean_field` held to closed forms, exact identities and simulations at finite width.

`run` gives the checks that are asserted; what theory does not promise at finite width is in `observations`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax import plots
from mimicnorm_jax.diagnostics import EmpiricalNTK, unit_diagonal
from mimicnorm_jax.theory import figures, random_mlp
from mimicnorm_jax.theory.checks import Check, expect_between, expect_close
from mimicnorm_jax.theory.fisher import fisher_bound
from mimicnorm_jax.theory.mean_field import PLAIN, WEIGHT_MEAN, S, batch_norm_chi
from mimicnorm_jax.theory.simulation import (
    condition_numbers,
    cosines,
    deep_kernels,
    energy_ratio,
    equicorrelated,
    inputs_of,
    jacobian,
    on_the_sphere,
    sample,
    sharpness,
    tangent_growth,
    tangent_kernels,
)
from mimicnorm_jax.theory.stack import Stack

STATEMENT = """\
What holds, and what does not:
These are statements about initialization. In infinitely wide ReLU MLPs with centered weights, small correlations of
inputs shrink to 0.733 of themselves per layer and small perturbations grow by 1.467 per layer in mean square; the
tangent kernel tends to a multiple of the identity, where that of He's initialization keeps a condition number of about
1 + N/3 for N inputs. At width n the same is true of the kernel scaled to a unit diagonal; the kernel as it is comes
close to condition number 1 only for depths far below n/4. BatchNorm over a batch of B behaves similarly, at a
batch-dependent rate, chi(B), and with one soft direction, the mean over the batch. Zero padding and pooling bring the
growth down to 1.1-1.5 per layer and leave inputs correlated. Residual networks with the published branch scalars
1.2^k/l are not chaotic, as the sum of 1/l^2 converges; with 1/sqrt(l) they grow polynomially. Chaotic networks have
exploding gradients: the largest stable learning rate of an MLP without skips falls about like chi^-L, so this favors
moderate depth. On 16 images of CIFAR-100, centering lowered the tangent kernel's condition number about six times in
VGG-16, eleven times in ResNet-18 and 28 times in ResNet-50 (benchmarks/results/trainability.md)."""


def transition_map(key: jax.Array) -> list[Check]:
    """Weight mean's map of correlations and its slopes, in closed form and by automatic differentiation."""
    del key
    # The map's second derivative is infinite at 1, where autodiff has no slope: it steps aside, by 4e-7 in the slope.
    at = jnp.array([0, 1 - 1e-13, 1])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(WEIGHT_MEAN.correlation_map)))(at)
    _, derivative = WEIGHT_MEAN.layer(jnp.eye(2))
    return [
        expect_close(name, setting, float(value), expected, 1e-6)
        for name, setting, value, expected in (
            ("Tbar(0)", "closed form", values[0], 0),
            ("Tbar(1)", "closed form", values[2], 1),
            ("Tbar'(1)", "closed form", WEIGHT_MEAN.chi(), 1.466942),
            ("Tbar'(1)", "autodiff", slopes[1], 1.466942),
            ("Tbar'(0)", "closed form", derivative[0, 1], 0.733471),
            ("Tbar'(0)", "autodiff", slopes[0], 0.733471),
        )
    ]


def energy(key: jax.Array) -> list[Check]:
    """Theorem 3: centered layers of the exact variance keep the mean square."""
    samples = sample(energy_ratio, random_mlp.weight_mean(inputs=16, width=64, depth=9, outputs=64), key, 400)
    return [expect_close("energy kept over 8 layers, q_8/q_0", "n = 64, 400 seeds", samples, 1, 0.10)]


def layer_jacobian(key: jax.Array) -> list[Check]:
    """The Jacobian of one layer stretches by chi_1 in mean square."""
    matrices = sample(jacobian, random_mlp.weight_mean(inputs=1, width=256, depth=2, outputs=256), key, 100)
    samples = (matrices**2).sum((1, 2)) / 256
    return [
        expect_close("mean squared singular value, 1 layer", "n = 256, 100 draws", samples, WEIGHT_MEAN.chi(), 0.04)
    ]


def growth(key: jax.Array) -> list[Check]:
    r"""Tangents grow by chi_1 per layer, and at finite width by a little less, beyond Fei et al.

    A tangent v and the signal z meet at an angle of mean squared cosine $c^2 = (2\pi - 3)/(S n)$ in a deep layer;
    then masked by the ReLU the tangent has a mean, and centering removes it: $\chi_1 (1 - c^2/\pi)$, 1.53/n.
    """
    width, depth, batch = 256, 24, 32
    centered_key, normalized_key = jax.random.split(key)
    mlp = random_mlp.weight_mean(inputs=16, width=width, depth=depth, outputs=width)
    rates = sample(tangent_growth, mlp, centered_key, 24).mean(1)
    expected = WEIGHT_MEAN.chi() * (1 - (2 - 3 / math.pi) / S / width)
    normed = random_mlp.batch_normalized(inputs=2 * batch, width=width, depth=depth, outputs=width)
    normed_rates = sample(tangent_growth, replace(normed, last_norm=True), normalized_key, 8).mean(1)
    return [
        expect_close("growth per layer, weight mean", "n = 256, L = 24, 24 seeds", rates, expected, 0.04),
        expect_close(
            "growth per layer, BatchNorm", "B = 32, n = 256, 8 seeds", normed_rates, batch_norm_chi(batch), 0.02
        ),
    ]


def correlations(key: jax.Array) -> list[Check]:
    """One layer's map of two inputs' correlation, and the spread that finite width leaves in deep layers."""
    mlp = random_mlp.weight_mean(inputs=3, width=512, depth=2, outputs=512)
    x = inputs_of(jnp.array([[1, 0.5, 0.9], [0.5, 1, 0.5], [0.9, 0.5, 1]]))
    map_key, spread_key = jax.random.split(key)
    second = sample(cosines(x), mlp, map_key, 60)[:, -1, 0]
    half, nine_tenths = WEIGHT_MEAN.correlation_map(jnp.array([0.5, 0.9])).tolist()
    width, pairs = 256, np.triu_indices(32, 1)
    mlp = random_mlp.weight_mean(inputs=32, width=width, depth=30, outputs=width)
    deep = sample(cosines(inputs_of(jnp.eye(32))), mlp, spread_key, 16)[:, 14:, *pairs]
    samples = np.sqrt((deep**2).mean((1, 2)) * width)
    return [
        expect_close("Tbar(0.5)", "n = 512, 60 seeds", second[:, 1], half, 0.04),
        expect_close("Tbar(0.9)", "n = 512, 60 seeds", second[:, 2], nine_tenths, 0.05),
        expect_close("rms pair correlation times sqrt(n)", "n = 256, layers 15-30, 16 seeds", samples, 1.80, 0.08),
    ]


def recursion(key: jax.Array) -> list[Check]:
    """Condition number of the infinite-width tangent kernel by depth."""
    del key
    depths, gram = (4, 8, 13, 20, 50), equicorrelated(32, 0.5)
    known = (
        ("weight mean", WEIGHT_MEAN, (7.9603, 1.8581, 1.0447, 1.0005, 1.0000)),
        ("plain", PLAIN, (25.583, 21.711, 19.274, 17.417, 14.576)),
    )
    rows = []
    for kind, mlp, values in known:
        kernels = jax.jit(lambda gram, mlp=mlp: [mlp.kernels(gram, depth)[1] for depth in depths])(gram)
        for depth, value, measured in zip(depths, values, condition_numbers(kernels), strict=True):
            name, setting = f"kappa at infinite width, {kind}", f"rho = 0.5, N = 32, L = {depth}"
            rows.append(expect_close(name, setting, float(measured), value, 1e-4 * value))
    return rows


def kernel_mean(key: jax.Array) -> list[Check]:
    """The empirical tangent kernel, over its infinite-width limit, is 1 on the diagonal and off it."""
    gram, depth = equicorrelated(16, 0.5), 5
    mlp = random_mlp.weight_mean(inputs=16, width=256, depth=depth, outputs=10)
    ratios = tangent_kernels(mlp, inputs_of(gram), key, 40) / np.asarray(WEIGHT_MEAN.kernels(gram, depth)[1])
    off = ~np.eye(16, dtype=bool)
    setting = "n = 256, L = 5, 40 seeds"
    return [
        expect_close("NTK over its limit, diagonal", setting, ratios[:, ~off].mean(1), 1, 0.05),
        expect_close("NTK over its limit, off the diagonal", setting, ratios[:, off].mean(1), 1, 0.18),
    ]


def kernel_condition(key: jax.Array) -> list[Check]:
    """Condition number of the tangent kernel scaled to a unit diagonal, by kind of MLP: the mean over networks."""
    bounds: dict[str, dict[str, float]] = {
        "weight mean": {"high": 1.2},
        "plain": {"low": 15},
        "BatchNorm": {"low": 6, "high": 11},
    }
    return [
        expect_between(
            f"kappa of the unit-diagonal NTK, {kind}",
            "n = 256, L = 16, N = 32, 6 seeds",
            condition_numbers(unit_diagonal(kernels)),
            **bounds[kind],
        )
        for kind, kernels in deep_kernels(key).items()
    ]


def identities(key: jax.Array) -> list[Check]:
    """What centering and the last BN make exactly zero, relative to the largest entry or eigenvalue."""
    mlp = replace(random_mlp.weight_mean(inputs=8, width=64, depth=4, outputs=3), last_norm=True)
    kernel_key, input_key = jax.random.split(key)
    params, x = mlp.init(kernel_key), on_the_sphere(input_key, 12, 8)
    gradient = jax.jit(jax.grad(lambda params: (mlp.apply(params, x) ** 3).sum()))(params)
    centered = [np.asarray(gradient[f"layer{i}"]) for i in range(2, mlp.depth + 1)]
    sums = max(float(np.abs(each.sum(0)).max() / np.abs(each).max()) for each in centered)
    kernel = EmpiricalNTK(
        mlp.apply, weights=mlp.init_variance, implementation="jacobian_contraction", batch_coupled=True
    )
    ntk = np.asarray(kernel(params, x))
    largest = np.linalg.eigvalsh(ntk.transpose(0, 2, 1, 3).reshape(36, 36))[-1]

    def image(vectors: np.ndarray) -> float:
        """Largest norm of the kernel's product with one output's vector, of the columns of `(N, O)`."""
        unit = vectors / np.linalg.norm(vectors, axis=0)
        return float(np.linalg.norm(np.einsum("nmop,mp->nop", ntk, unit), axis=(0, 1)).max() / largest)

    logits = np.asarray(replace(mlp, last_norm=False).apply(params, x))
    return [
        expect_between("column sums of a centered kernel's gradient", "n = 64, L = 4", sums, high=1e-12),
        expect_between(
            "last BN's NTK on the vector 1, per output", "N = 12, 3 outputs", image(np.ones((12, 3))), high=1e-10
        ),
        expect_between("last BN's NTK on the logits, per output", "N = 12, 3 outputs", image(logits), high=1e-10),
    ]


def fisher(key: jax.Array) -> list[Check]:
    """The mean-field bound on the Fisher information's largest eigenvalue, beside gradients and the eigenvalue."""
    samples, draws = 64, 16
    dense = Stack((32, 128, 128, 128), bias_variance=0.5)
    images = Stack((3, 24, 48), side=7, window=3, pooled=True, bias_variance=0.5)
    normed, normed_images = (replace(stack, gamma=1.0, differentiated=False) for stack in (dense, images))
    stacks = {"plain": dense, "BatchNorm": normed, "plain, conv": images, "BatchNorm, conv": normed_images}
    rows = []
    for i, (kind, stack) in enumerate(stacks.items()):
        found = sharpness(stack, jax.random.fold_in(key, i), samples, draws)
        bound = fisher_bound(stack, samples=samples).sum()
        setting = f"{stack.channels[-1]} channels, N = {samples}, {draws} seeds"
        gradients, top = found[:, :-1].sum(1) / bound, found[:, -1] / bound
        rows.append(expect_close(f"squared mean gradient over mean field, {kind}", setting, gradients, 1, 0.25))
        rows.append(expect_between(f"largest Fisher eigenvalue over its bound, {kind}", setting, top, 0.8, 1.5))
    through = replace(normed, differentiated=True)
    found = sharpness(through, jax.random.fold_in(key, len(stacks)), samples, draws)
    top = found[:, -1] / fisher_bound(through, samples=samples)[-1]
    name = "the same over the last layer's part, BatchNorm, through its statistics"
    return [*rows, expect_between(name, f"128 channels, N = {samples}, {draws} seeds", top, 0.9, 1.25)]


CHECKS: tuple[Callable[[jax.Array], list[Check]], ...] = (
    transition_map,
    energy,
    layer_jacobian,
    growth,
    correlations,
    recursion,
    kernel_mean,
    kernel_condition,
    identities,
    fisher,
)
"""Every check, in the order of the report; each draws its networks from the key that it is given."""


def run(seed: int) -> list[Check]:
    """All checks, in double precision whatever the process is set to; the same seed gives the same rows."""
    with jax.enable_x64(True):
        key = jax.random.key(seed)
        return [row for i, check in enumerate(CHECKS) for row in check(jax.random.fold_in(key, i))]


def draw_figures(folder: Path, seed: int) -> list[Path]:
    """Draws the theory beside simulations, the paper's Figures 2 to 4 and its App. B.1 among them.

    Args:
      folder: exists; a picture of the same name is replaced.
      seed: of the simulated networks.

    Returns:
      The pictures' paths.
    """
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 5)
        names = ("transition_maps", "correlations", "condition_numbers", "spectra", "activations")
        paths = [folder / f"{name}.png" for name in names]
        plots.transition_maps(*figures.transition_maps(keys[0]), paths[0], "one ReLU layer, n = 576, 20 networks")
        title = "210 pairs of inputs of correlation 0.5 through one network, n = 300"
        plots.correlations_by_depth(figures.pair_correlations(keys[1]), paths[1], title)
        conditions = figures.kernel_conditions(keys[2])
        title = "32 inputs of correlation 0.5; points: n = 512, 4 networks"
        plots.condition_numbers(conditions.limit, conditions.scaled, conditions.raw, paths[2], title)
        title = "Jacobian of centered layers, n = 512, 10 networks"
        plots.spectra(figures.spectra(keys[3]), figures.marchenko_pastur, paths[3], title)
        title = "1000 inputs through one network of 51 layers, n = 300"
        plots.activations_by_layer(figures.activations(keys[4]), paths[4], title)
    return paths
