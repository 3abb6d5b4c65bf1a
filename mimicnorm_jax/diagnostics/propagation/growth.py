r"""Growth of a perturbation from layer to layer: the empirical $\chi_1$.

A random tangent at the inputs is carried through the network. At each layer's product z its mean square is compared
with the signal's, $r_l = |dz_l|^2 / |z_l|^2$; $\chi_1 = r_{l+1} / r_l$ in the infinitely wide MLP, where it is
$\bar T'(1)$ (see `theory.InfiniteMLP.chi`). At width n the mean of $\log r_{l+1}/r_l$ is lower: by about 1.8/n for
weight mean, not at all for a plain MLP. (1.53/n is by how much the arithmetic mean of the tangent's own growth is
lower, see `theory.verify`.)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.layers import (
    EVERYTHING,
    ByLayer,
    View,
    check_floating,
    check_num_samples,
    coupled_groups,
    forward_mode,
    prepared,
    select,
    static,
    trace,
)
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn
from mimicnorm_jax.errors import unknown


@dataclass(frozen=True)
class Growth:
    """How a perturbation grew over the layers, relative to the signal.

    Standard errors are those of a draw of examples and tangents at the given weights; for the spread over weights,
    repeat with other seeds.

    Attributes:
      names: of the layers, in the order of evaluation, L.
      log_ratios: $\\log r_l$ of each sample, `(samples, L)`, natural logarithm. A sample is an example, of which the
        tangents are averaged, or a tangent, where there is one example or one coupled batch.
    """

    names: tuple[str, ...]
    log_ratios: np.ndarray

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Growth factor from each layer to the next (geometric mean over samples) and its standard error, `(L - 1,)`.

        NaN beside a layer on which the signal or the tangent vanishes.
        """
        return _factor(np.diff(self.log_ratios, axis=1))

    def rate(self, first: str | None = None, last: str | None = None) -> tuple[float, float]:
        """Growth factor per layer, the geometric mean from one layer to a later one, and its standard error.

        Args:
          first: name of the layer to start from; None for the first.
          last: name of the layer to end at; None for the last.

        Raises:
          ValueError: for an unknown layer, or if `first` is not before `last`.
        """
        for name in (first, last):
            if name is not None and name not in self.names:
                raise ValueError(unknown("layer", name, self.names))
        start = 0 if first is None else self.names.index(first)
        stop = len(self.names) - 1 if last is None else self.names.index(last)
        if start >= stop:
            raise ValueError(
                f"first is layer {self.names[start]!r}, last is layer {self.names[stop]!r}: growth is from a layer to "
                f"a later one; the order is {', '.join(self.names)}"
            )
        factor, error = _factor((self.log_ratios[:, stop] - self.log_ratios[:, start]) / (stop - start))
        return float(factor), float(error)


def _factor(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factor = np.exp(logs.mean(0))
    return factor, factor * logs.std(0, ddof=1) / np.sqrt(len(logs))


def _log_mean_square(values: jax.Array) -> jax.Array:
    """Without overflow in the squares; NaN if all is zero."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    largest = abs(values).max()
    return jnp.log(jnp.mean((values / largest) ** 2)) + 2 * jnp.log(largest)


@partial(jax.jit, static_argnames=("apply_fn", "num_samples", "view"))
def _log_ratios(
    apply_fn: ApplyFn, params: Any, x: jax.Array, key: jax.Array, num_samples: int, view: View
) -> tuple[ByLayer, jax.Array, jax.Array]:
    """By layer, `(groups, num_samples)`; the outputs; by layer, whether all tangents are finite."""
    network = trace(apply_fn, params, x, view.batch_coupled)
    chosen = select(network, view.layers)
    if len(chosen) < 2:
        raise ValueError(f"the layers are {', '.join(layer.name for layer in chosen)}: growth is from one to another")

    def products(group: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        outputs, evaluation = network.run(params, group)
        return [evaluation.products[layer.index] for layer in chosen], outputs

    def one(group: jax.Array, tangent: jax.Array) -> Any:
        signals, tangents, outputs = jax.jvp(products, (group,), (tangent,), has_aux=True)
        pairs = zip(signals, tangents, strict=True)
        logs = jnp.stack([_log_mean_square(t) - _log_mean_square(s) for s, t in pairs])
        return logs, jnp.stack([jnp.isfinite(t).all() for t in tangents]), outputs

    xs = coupled_groups(x, view.batch_coupled)
    tangents = jax.random.normal(key, (num_samples, *xs.shape), xs.dtype)
    logs, finite, outputs = jax.vmap(jax.vmap(one), (None, 0), (1, 1, None))(xs, tangents)
    by_layer = ByLayer(tuple(layer.name for layer in chosen), tuple(jnp.moveaxis(logs, -1, 0)))
    return by_layer, outputs.reshape(len(x), -1), finite.all((0, 1))


def perturbation_growth(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    view: View = EVERYTHING,
    *,
    key: jax.Array,
    num_samples: int = 4,
) -> Growth:
    r"""Growth of a random tangent's mean square relative to the signal's, layer by layer.

    Logarithms throughout: $\chi^L$ itself overflows float32 at L = 232. In a residual network the layers follow one
    another in the order of evaluation, so a step is not always one from a layer's input to its output: the first
    convolution of a branch is compared with the last of the branch before; name layers along one path, such as the
    first convolution of each block, to follow the growth per block. The first step of a network with BatchNorm is
    smaller than the later ones, since BatchNorm removes the tangent's batch mean: leave it out by `Growth.rate`.

    Args:
      apply_fn: the network.
      params: its parameters.
      x: inputs, `(N, ...)`, floating-point; the tangents are standard normal in their space.
      view: which layers, at least two. If it is `batch_coupled`, the perturbation is one of all of `x` together.
      key: for the tangents.
      num_samples: tangents of each example.

    Returns:
      The growth, over all N examples.

    Raises:
      ValueError: for an unknown layer, fewer than two layers or samples, or values that are not finite.
    """
    view = static(view)
    apply_fn, params, x = prepared(apply_fn, params, x, view.batch_coupled)
    check_floating(x)
    if view.batch_coupled or len(x) == 1:
        check_num_samples(num_samples)
    elif num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: each example needs at least one tangent")
    with forward_mode("growth"):
        found, outputs, finite = _log_ratios(apply_fn, params, x, key, num_samples, view)
    check_finite(outputs)
    if not finite.all():
        raise ValueError(
            f"the tangent overflows {outputs.dtype} at layer {found.names[int(np.argmin(finite))]!r}, the signal does "
            "not: use float64 (jax.enable_x64()), or name earlier layers only"
        )
    logs = np.stack([np.asarray(values, np.float64) for values in found.values], -1)
    return Growth(found.names, logs[0] if len(logs) == 1 else logs.mean(1))
