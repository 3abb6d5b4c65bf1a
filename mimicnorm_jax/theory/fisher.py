r"""A lower bound on the largest eigenvalue of the Fisher information of wide networks, in mean-field theory.

For outputs with a Gaussian likelihood the Fisher information is $F = E_x[\nabla f(x) \nabla f(x)^\top]$. The direction
of the mean gradient gives $\lambda_{max} \ge |E_x \nabla f|^2 = E_{xy}[\nabla f(x) \cdot \nabla f(y)]$, which is a sum
over layers (Wei, Stokes & Schwab 2019, arXiv 1903.02606, claim 3.1), for a dense layer
$f_l = N_{l-1}\, \hat q_{xy}^{l-1}\, \tilde q_{xy}^l$: inner products of what the layer sees, per unit, and of the
derivatives by what it gives.

For a convolution of $|K_l|$ output positions the paper prints
$N_{l-1} [(|K_l|-1) \tilde q_{ab,xy} + \tilde q_{xy}] [(|K_l|-1) \hat q_{ab,xy} + \hat q_{xy}]$. A kernel's gradient is
a sum over positions of derivative times patch *at the same position*; its inner product with another example's is
$N_{l-1} |K_l| [(|K_l|-1) \tilde q_{ab,xy} \hat q_{ab,xy} + \tilde q_{xy} \hat q_{xy}]$, which is computed here and is
the same thing where two examples have no more in common at one position than at two, as behind layers of white noise.
BatchNorm divides by the variance *over batch and positions*: the part of $q$ that all examples share, such as the
bias's, is no variance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mimicnorm_jax.theory.duals import relu_dual
from mimicnorm_jax.theory.stack import Stack


class PairMoments(NamedTuple):
    r"""Mean products of a layer's values at two places, by what the two places share.

    Attributes:
      itself: of a value with itself, $q$.
      positions: at two positions of one example, $q_{ab}$.
      examples: at one position of two examples, $q_{xy}$.
      neither: at two positions of two examples, $q_{ab,xy}$.
    """

    itself: float
    positions: float
    examples: float
    neither: float

    @staticmethod
    def of(x: ArrayLike) -> "PairMoments":
        """The moments of inputs `(N, ..., C)`; `neither` and `positions` are 0 where there is one position.

        Raises:
          ValueError: for fewer than two examples.
        """
        values = np.asarray(x, np.float64)
        n, channels = len(values), values.shape[-1]
        if n < 2:
            raise ValueError(f"x has shape {values.shape}: moments of two examples take at least 2 of them")
        values = values.reshape(n, -1, channels)
        positions = values.shape[1]
        whole, each = (values.sum((0, 1)) ** 2).sum(), (values**2).sum()
        by_example, by_position = (values.sum(1) ** 2).sum(), (values.sum(0) ** 2).sum()
        neither = whole - by_example - by_position + each
        others = max(positions - 1, 1)
        return PairMoments(
            *(
                float(total / (channels * pairs))
                for total, pairs in (
                    (each, n * positions),
                    (by_example - each, n * positions * others),
                    (by_position - each, n * (n - 1) * positions),
                    (neither, n * (n - 1) * positions * others),
                )
            )
        )


WHITE = PairMoments(1.0, 0.0, 0.0, 0.0)
"""Independent standard normal inputs, at every position."""


def fisher_bound(stack: Stack, inputs: PairMoments = WHITE, samples: int | None = None) -> np.ndarray:
    r"""Each layer's part of the lower bound on the Fisher information's largest eigenvalue, for one output.

    The sum bounds $\lambda_{max}$ by all kernels at infinite width; biases would add less than the fan-in's part of it.
    With BatchNorm the statistics are held fixed, as in the paper. Derivatives through the statistics, which training
    takes, keep the last layer's part alone: that is a bound by itself, as the last kernel's is a block of F, and the
    parts of the layers before cancel.

    Args:
      stack: sizes and variances; `stack.differentiated` and `stack.outputs` make no difference.
      inputs: their moments.
      samples: N, if the mean over x is one over so many examples, which are also BatchNorm's batch: to
        $(N-1)/N$ of the above comes $1/N$ of the mean squared gradient. None for infinitely many.

    Returns:
      `(L,)`, nonnegative.

    Raises:
      ValueError: for no samples, or where BatchNorm would divide by a variance of 0.

    Example:
      >>> fisher_bound(Stack((4, 100, 100), gamma=1.0)).round(3).tolist()  # the last is 100 / (2 pi)
      [0.0, 11.674, 15.915]
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}: a mean is over at least one example")
    pairs = 1.0 if samples is None else 1 - 1 / samples
    seen = np.array(inputs)
    layers: list[tuple[np.ndarray, np.ndarray]] = []  # what a layer sees, and what derivatives pass behind it
    with jax.enable_x64(True):
        for side in stack.sides[1:]:
            z = stack.bias_variance + stack.weight_variance * seen
            gain = 1.0
            if stack.gamma is not None:
                mean = float(_shares(side, pairs) @ z)
                if z[0] - mean <= 1e-12 * z[0]:
                    raise ValueError(
                        f"BatchNorm divides by a variance of 0: with samples {samples} and {inputs}, all that it sees "
                        "is the same"
                    )
                gain = stack.gamma**2 / (z[0] - mean)
                z = gain * (z - mean)
            variance = jnp.full(4, z[0])
            after, slope, _ = relu_dual(variance, jnp.asarray(z), variance)
            layers.append((seen, stack.weight_variance * gain * np.asarray(slope)))
            seen = np.asarray(after)
    # Sums over output positions of products of derivatives, same and different, of one example and of two.
    last = stack.sides[-1] ** 2
    passed = np.array([1, last - 1, 1, last - 1]) / last if stack.pooled else np.array([1.0, 0, 1, 0])
    found = [seen * passed]
    for seen, factor in reversed(layers):
        passed = passed * factor
        found.append(seen * passed)
    products = np.array(stack.fan_ins)[:, None] * np.array(found[::-1])
    return (1 - pairs) * products[:, :2].sum(1) + pairs * products[:, 2:].sum(1)


def _shares(side: int, pairs: float) -> np.ndarray:
    """Shares of the kinds of `PairMoments` in all pairs of values of a batch; `pairs`: of two different examples."""
    same = 1 / side**2
    return np.array([(1 - pairs) * same, (1 - pairs) * (1 - same), pairs * same, pairs * (1 - same)])
