"""Small networks for the tests of the diagnostics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mimicnorm_jax import models


class Convolutional(nn.Module):
    """Stride 2, a border of 1, two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, padding=1, name="first")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Normalized(nn.Module):
    """BatchNorm over the batch that it is given."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, use_bias=False, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
        return nn.Dense(2, name="head")(x)


def resnet() -> nn.Module:
    """MimicNorm's smallest: stem, three blocks of two convolutions, two shortcuts, classifier."""
    return models.create("resnet8", width=0.5, num_classes=3)


def draw(seed: int, *shape: int) -> jax.Array:
    """Standard normal, float64 where that is enabled."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.result_type(float))


def filled(module: nn.Module, x: jax.Array, **kwargs: Any) -> Any:
    """Variables of the inputs' precision: He's kernels, zero biases and means, ones. Compiles no initialization."""
    rng = np.random.default_rng(1)

    def fill(path: Any, leaf: Any) -> jax.Array:
        if leaf.ndim > 1:
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = np.zeros(leaf.shape) if path[-1].key in ("bias", "mean") else np.ones(leaf.shape)
        return jnp.asarray(values, x.dtype)

    shapes = jax.eval_shape(lambda key, x: module.init(key, x, **kwargs), jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def reference(apply_fn: Any, params: Any, x: jax.Array) -> Any:
    """The tangent kernel `(N, M, O, P)` written out: no line of the library in it."""
    total = 0.0
    for leaf in jax.tree.leaves(jax.jit(jax.jacrev(apply_fn))(params, x)):
        rows = np.asarray(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), np.float64)
        rows = rows.reshape(*leaf.shape[:2], -1)
        total = total + np.einsum("nok,mpk->nmop", rows, rows)
    return total


def by_output(full: Any) -> dict[Any, Any]:
    """What `EmpiricalNTK` gives for each `output`, and for the first alone, where `full` is of all pairs."""
    return {
        "full": full,
        "diagonal": np.einsum("nmoo->nmo", full),
        "trace": np.einsum("nmoo->nm", full),
        0: full[:, :, 0, 0],
    }


def close(measured: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Equal up to a share of the largest entry."""
    np.testing.assert_allclose(measured, expected, rtol=0, atol=rtol * np.abs(expected).max())
