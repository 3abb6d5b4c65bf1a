"""How the tangent kernel of each family of networks is computed, and how far it is from the product of Jacobians.

Parameters are handled layerwise (their kernels are known, and no derivative by them is formed unless that is cheaper),
through their kernel's derivative, or example by example. All in float64, with random parameters.

  python -m benchmarks.ntk.families
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax import CenteredConv, KernelTransform, models
from mimicnorm_jax.diagnostics import EmpiricalNTK, from_linen
from mimicnorm_jax.functional import standardize
from mimicnorm_jax.linen import TransformedConv
from mimicnorm_jax.utils import log_line

STORE = Store("ntk_families", lambda record: (record["family"],))
WIDE = {"param_dtype": jnp.float64}
RESNET: dict[str, Any] = {"width": 0.25, "num_classes": 3, "dtype": "float64", "param_dtype": "float64"}


class Perceptron(nn.Module):
    """Dense layers with biases."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, **WIDE)(nn.relu(nn.Dense(8, **WIDE)(x.reshape(len(x), -1))))


class Convolutional(nn.Module):
    """Convolutions of some kind, an average and a classifier."""

    conv: Callable[[int], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (4, 6):
            x = nn.relu(self.conv(features)(x))
        return nn.Dense(3, **WIDE)(x.mean((1, 2)))


class Attention(nn.Module):
    """A transformer's block on the rows of an image as tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8, **WIDE)(x.reshape(len(x), x.shape[1], -1))
        y = nn.LayerNorm(**WIDE)(x)
        x = x + nn.MultiHeadDotProductAttention(2, **WIDE)(y, y)
        x = x + nn.Dense(8, **WIDE)(nn.gelu(nn.Dense(16, **WIDE)(nn.LayerNorm(**WIDE)(x))))
        return nn.Dense(3, **WIDE)(x.mean(1))


class Recurrent(nn.Module):
    """A scan over the rows of an image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        states: Any = nn.RNN(nn.SimpleCell(6, **WIDE))(x.reshape(len(x), x.shape[1], -1))
        return nn.Dense(3, **WIDE)(states[:, -1])


class Layer(nn.Module):
    """A residual layer of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(8, **WIDE)(nn.gelu(nn.Dense(16, **WIDE)(nn.LayerNorm(**WIDE)(x)))), None


class Scanned(nn.Module):
    """Three layers whose parameters are stacked (`nn.scan`), on the rows of an image as tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8, **WIDE)(x.reshape(len(x), x.shape[1], -1))
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(3, **WIDE)(layers()(x, None)[0].mean(1))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "perceptron": Perceptron,
    "convolutions": lambda: Convolutional(lambda c: nn.Conv(c, (3, 3), **WIDE)),
    "centered convolutions": lambda: Convolutional(lambda c: CenteredConv(c, (3, 3), **WIDE)),
    "weight standardization": lambda: Convolutional(
        lambda c: TransformedConv(c, (3, 3), kernel_transform=KernelTransform(standardize), **WIDE)
    ),
    "grouped convolutions": lambda: Convolutional(lambda c: nn.Conv(c, (3, 3), feature_group_count=2, **WIDE)),
    "weight normalization": lambda: Convolutional(lambda c: nn.WeightNorm(nn.Conv(c, (3, 3), **WIDE), **WIDE)),
    "resnet8, MimicNorm": lambda: models.create("resnet8", **RESNET),
    "resnet8, BatchNorm with running averages": lambda: models.create("resnet8", method="batchnorm", **RESNET),
    "transformer": Attention,
    "transformer's layers in a scan": Scanned,
    "recurrent": Recurrent,
    "resnet8, weight standardization and GroupNorm": lambda: models.create("resnet8", method="ws_gn", **RESNET),
}


def measure(family: str) -> Record:
    """How a family's kernel of four examples is computed, and its error."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 4, 2)))
    module = FAMILIES[family]()
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1 + 0.2 * abs(noise))

    apply_fn, params = from_linen(module, jax.tree.map(fill, shapes))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    plan, prepared = kernel.prepare(params, x)
    how: Any = prepared.implementation
    sizes = how.network.sizes
    through = {leaf for layer in how.general for leaf in layer.leaves}
    found = np.asarray(kernel(params, x))
    exact: Any = 0.0
    for leaf in jax.tree.leaves(jax.jit(jax.jacrev(apply_fn))(params, x)):
        rows = np.asarray(leaf).reshape(*leaf.shape[:2], -1)
        exact = exact + np.einsum("nok,mpk->nmop", rows, rows)
    return {
        "family": family,
        "parameters": sum(sizes),
        "layerwise": sum(sizes[leaf] for leaf in {known.leaf for known in how.kernels}),
        "through_kernel": sum(sizes[leaf] for leaf in through),
        "by_example": sum(sizes[leaf] for leaf in how.dense if leaf not in through),
        "error": float(np.abs(found - exact).max() / np.abs(exact).max()),
        "by_channel": sum(kernel.by_channel for kernel in how.kernels),
        "in_loops": len(how.network.looped),
        "proven": plan.independence is not None and plan.independence.proven,
        "machine": _results.machine(),
    }


def page(records: list[Record]) -> str:
    """The table of all families."""

    def share(record: Record, name: str) -> str:
        return f"{100 * record[name] / record['parameters']:.0f} %"

    rows = [
        (
            *(r["family"], r["parameters"]),
            *(share(r, name) for name in ("layerwise", "through_kernel", "by_example")),
            *(f"{r['error']:.0e}", "by the jaxpr" if r["proven"] else "in numbers"),
        )
        for r in records
    ]
    header = ["family", "parameters", "layerwise", "through their kernel", "by example", "error", "independence"]
    return f"""# How tangent kernels of families of networks are computed

{_results.table(header, rows)}

Shares of the parameters; largest error relative to the largest entry of the product of explicit Jacobians, in float64.
Layerwise: no derivative by the parameter is formed where its factors are cheaper. Kernels with a factor by channel
(weight standardization and normalization) are layerwise where that is cheaper, which small convolutions of large images
are not: then they go through their kernel. Layers inside a loop of few turns are layers of their own where that is
cheaper; else they are differentiated by example.

Command: `python -m benchmarks.ntk.families`. Machine: {_results.machines(records)}.
"""


def main() -> None:
    arguments = _results.make_parser("ntk.families", __doc__).parse_args()
    for family in () if arguments.render else FAMILIES:
        with jax.enable_x64(True):
            record = measure(family)
        log_line(f"{family}: error {record['error']:.1e}")
        STORE.add(arguments.results, record)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
