r"""Moments of an activation under a pair of Gaussians: ReLU's closed form, and any by numerical integration."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core


class DualActivation(Protocol):
    """Moments of an activation under a pair of Gaussians."""

    def __call__(self, k11: jax.Array, k12: jax.Array, k22: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Moments for variances `k11`, `k22` and covariance `k12`, arrays of one shape.

        Returns:
          $E[\\phi(u)\\phi(v)]$, $E[\\phi'(u)\\phi'(v)]$ and $E[\\phi(u)]E[\\phi(v)]$, elementwise.
        """
        ...


def as_real(values: Any) -> jax.Array:
    """An array of floating point, as kernels are, of what may hold whole numbers; of the same type where it is one.

    Args:
      values: an array or a number.
    """
    return jnp.asarray(values, jnp.result_type(values, float))


def correlation(k11: jax.Array, k12: jax.Array, k22: jax.Array) -> jax.Array:
    r"""$k_{12} / \sqrt{k_{11} k_{22}}$ within [-1, 1], elementwise; 0 where a variance is 0."""
    scale = _scale(k11, k22)
    return _within(k12 / jnp.where(scale > 0, scale, 1))


@jax.custom_jvp
def _within(rho: jax.Array) -> jax.Array:
    """What rounding took out of [-1, 1] comes back, and is still what the inputs move."""
    return jnp.clip(rho, -1, 1)


_within.defjvps(lambda tangent, _, rho: tangent)


def _scale(k11: jax.Array, k22: jax.Array) -> jax.Array:
    """The root of the product: exact of equal variances, which a product of roots is not."""
    k11, k22 = as_real(k11), as_real(k22)
    positive = (k11 > 0) & (k22 > 0)
    first, second = (jnp.where(positive, k, 1) for k in (k11, k22))
    product = first * second
    info = jnp.finfo(product.dtype)
    power = 2.0 ** (info.maxexp // 2)
    small = (product < info.tiny) & (jnp.maximum(first, second) < 1)
    by = jnp.where(jnp.isinf(product), 1 / power, jnp.where(small, power, 1))  # keeps what follows in the range
    root = jnp.sqrt((first * by) * (second * by)) / by
    return jnp.where(positive, root, jnp.sqrt(k11) * jnp.sqrt(k22))  # whose derivatives at 0 are those of the roots


def relu_dual(k11: jax.Array, k12: jax.Array, k22: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The closed form of ReLU (arc-cosine kernels, Cho & Saul 2009).

    With $\rho = k_{12}/\sqrt{k_{11}k_{22}}$:
    $\hat\phi(\rho) = (\sqrt{1-\rho^2} + (\pi - \arccos\rho)\rho) / 2\pi$.

    The first moment has a derivative at every correlation, also at 1, an input's with itself. That of the second is
    infinite at correlations of 1 and -1, where it has the kink of $-|u - v|$: there it is 0, the mean of both sides,
    as of ReLU's own at 0.

    Args:
      k11: variances of the first input.
      k12: covariances.
      k22: variances of the second input.

    Returns:
      See `DualActivation`.

    Example:
      >>> one = jnp.ones(())
      >>> [round(float(moment), 4) for moment in relu_dual(one, 0 * one, one)]
      [0.1592, 0.25, 0.1592]
    """
    scale = _scale(k11, k22)
    rho = correlation(k11, k12, k22)
    return scale * _relu_product(rho), _relu_slope(rho), scale / (2 * jnp.pi)


@jax.custom_jvp
def _relu_product(rho: jax.Array) -> jax.Array:
    return jnp.sqrt(1 - rho**2) / (2 * jnp.pi) + _relu_slope(rho) * rho


@jax.custom_jvp
def _relu_slope(rho: jax.Array) -> jax.Array:
    return (jnp.pi - jnp.arccos(rho)) / (2 * jnp.pi)


_relu_product.defjvps(lambda tangent, _, rho: tangent * _relu_slope(rho))  # where autodiff subtracts infinities
_relu_slope.defjvps(lambda tangent, _, rho: tangent * _inverse_root(1 - rho**2) / (2 * jnp.pi))


def _inverse_root(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def quadrature_dual(
    phi: Callable[[jax.Array], jax.Array], nodes: int = 129, kinks: Sequence[float] = (0.0,)
) -> DualActivation:
    """Moments of any elementwise activation by numerical integration, with a check that it converged.

    Panels of a tanh-sinh rule end where an argument is 0 or at a kink; time grows with `nodes` squared. Every call
    compares with half the points and refuses moments that the two give more than 1e-3 apart, relative to
    `sqrt(E[phi(u)^2] E[phi(v)^2])` or likewise for the derivative. What it accepts of ReLU and erf, at variances from 0
    to 1e6 and any correlation, is within 1e-6 of the closed forms in double precision; in single precision a slope can
    be off by 3e-3 of the scale next to a correlation of 1. At variance 0 it is the limit.

    Args:
      phi: the activation; its derivative is taken by JAX.
      nodes: in each of up to `len(kinks) + 2` panels, in each of two dimensions; odd, at least 9.
      kinks: arguments at which `phi` or its derivative jumps or is steep, such as -1 and 1 of a clipped identity.

    Returns:
      The moments. A call raises ValueError where they have not converged; what cannot raise, because it is
      compiled or differentiated, gives NaN.

    Raises:
      ValueError: for a number of nodes that is even or below 9.
    """
    if nodes < 9 or nodes % 2 == 0:
        raise ValueError(f"nodes is {nodes}: it is an odd number of at least 9, of which every second makes the check")
    moments = partial(_moments, phi, nodes, tuple(kinks))

    def dual(k11: jax.Array, k12: jax.Array, k22: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        second, slope, means, error = jnp.vectorize(moments, signature="(),(),()->(),(),(),()")(k11, k12, k22)
        refused = ~(error <= _CONVERGED)
        if not isinstance(refused, core.Tracer) and refused.any():
            raise ValueError(
                f"the moments of this activation with {nodes} nodes a panel and with half of them are "
                f"{error.max():.1e} apart, more than {_CONVERGED}: name its kinks and steep places (kinks is "
                f"{tuple(kinks)}), or take more nodes"
            )
        return (
            jnp.where(refused, jnp.nan, second),
            jnp.where(refused, jnp.nan, slope),
            jnp.where(refused, jnp.nan, means),
        )

    return dual


_CONVERGED = 1e-3


def _moments(
    phi: Callable[[jax.Array], jax.Array],
    nodes: int,
    kinks: tuple[float, ...],
    k11: jax.Array,
    k12: jax.Array,
    k22: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The three moments of `DualActivation`, all scalars `()`, and how far half the points are from them."""

    def values(x: jax.Array) -> jax.Array:  # (2, n)
        return jnp.stack([phi(x), jax.vmap(jax.grad(phi))(x)])

    rho = correlation(k11, k12, k22)
    rest = jnp.sqrt(1 - rho**2)
    tiny = jnp.finfo(rho.dtype).tiny
    # The limit at variance 0: both signs of the argument count.
    su, sv = (jnp.sqrt(jnp.maximum(k, jnp.sqrt(tiny))) for k in (k11, k22))

    def given(x: jax.Array) -> jax.Array:  # phi(v) and phi'(v) where u = su x, by both rules: (2, 2)
        y, weights = normal_rule([(kink / sv - rho * x) / jnp.maximum(rest, tiny) for kink in kinks], nodes, rho.dtype)
        return jnp.einsum("ri,fi->rf", weights, values(sv * (rho * x + rest * y)))

    (x, weights_u), (y, weights_v) = (
        normal_rule([kink / s for kink in kinks if kink], nodes, rho.dtype) for s in (su, sv)
    )
    at_u, at_v = values(su * x), values(sv * y)
    both = jnp.einsum("ri,fi,irf->rf", weights_u, at_u, jax.lax.map(given, x))
    means = jnp.einsum("ri,i->r", weights_u, at_u[0]) * jnp.einsum("ri,i->r", weights_v, at_v[0])
    squares = [jnp.einsum("i,fi->f", weights[0], at**2) for weights, at in ((weights_u, at_u), (weights_v, at_v))]
    scale = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])
    off = jnp.abs(jnp.stack([*(both[0] - both[1]), means[0] - means[1]]))
    ends = jnp.stack([values(s * jnp.array([-REACH, REACH], s.dtype)) for s in (su, sv)])
    cut = ends**2 * math.exp(-(REACH**2) / 2) / jnp.maximum(jnp.stack(squares), tiny)[:, :, None]
    error = jnp.maximum(jnp.max(off / jnp.maximum(scale[jnp.array([0, 1, 0])], tiny)), jnp.max(cut))
    return both[0, 0], both[0, 1], means[0], error


REACH = 9.0
"""Beyond so many standard deviations nothing is counted: exp(-REACH^2 / 2) is 3e-18."""
_END = 2.8  # of tanh-sinh's variable: what is left out at each end of a panel is 1e-11 of it


def _unit_rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The tanh-sinh rule on (0, 1) (Takahasi & Mori 1974): nodes crowd at both ends, whatever happens there."""
    t = np.linspace(-_END, _END, nodes)
    u = math.pi / 2 * np.sinh(t)
    return 1 / (1 + np.exp(-2 * u)), (t[1] - t[0]) * math.pi / 4 * np.cosh(t) / np.cosh(u) ** 2


def normal_rule(breaks: Sequence[jax.Array], nodes: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Points and weights of the expectation over a standard normal variable, in panels between `breaks` and 0.

    Args:
      breaks: B scalars `()` in any order, near which the function may be steep or have a kink.
      nodes: in each panel; an odd number.
      dtype: of points and weights.

    Returns:
      Points `((B + 2) nodes,)` and two rows of weights `(2, (B + 2) nodes)`: of the rule, and of the one that takes
      every second point. Their difference bounds the error of a sum that converges.
    """
    unit, weights = _unit_rule(nodes)
    edges = jnp.sort(jnp.asarray([-REACH, 0, REACH, *(jnp.clip(b, -REACH, REACH) for b in breaks)], dtype))
    start, length = edges[:-1, None], (edges[1:] - edges[:-1])[:, None]
    points = start + length * jnp.asarray(unit, dtype)[None]
    density = jnp.exp(-(points**2) / 2) / math.sqrt(2 * math.pi) * length
    second = np.where(np.arange(nodes) % 2, 0, 2 * weights)
    rows = jnp.asarray(np.stack([weights, second]), dtype)
    return points.reshape(-1), (density[None] * rows[:, None]).reshape(2, -1)
