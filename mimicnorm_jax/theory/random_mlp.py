r"""Random fully-connected ReLU MLPs of finite width: the networks that `mean_field` is checked on.

The first layer is neither centered nor scaled, $z^1 = W^1 x$ with variance $1/n_0$, so that $K^1$ is the inputs' Gram
matrix over $n_0$; every later layer is $z^{l+1} = W^{l+1} \phi(z^l)$ with variance $\sigma_w^2/n$. No biases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mimicnorm_jax.functional.activations import relu
from mimicnorm_jax.functional.kernels import center, gain

Params = dict[str, jax.Array]
"""Raw kernels `(n_in, n_out)` by layer: `layer1`, `layer2`, ..."""


def batch_norm(z: jax.Array) -> jax.Array:
    """BatchNorm of `(N, C)` over the batch, without parameters and without epsilon: exact mean 0 and variance 1."""
    centered = z - z.mean(0, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(0, keepdims=True))


@dataclass(frozen=True)
class RandomMLP:
    r"""An MLP of `depth` weight layers at initialization, as pure functions of its raw kernels.

    Attributes:
      inputs: $n_0$.
      width: $n$, of every layer but the last.
      depth: $L$, number of weight layers, at least 1.
      outputs: width of the last layer, which is linear and otherwise like the others.
      weight_variance: $\sigma_w^2$, the variance of a weight times the fan-in, from the second layer on.
      centered: whether kernels from the second on are read through `functional.kernels.center`.
      normalized: whether BatchNorm stands before every ReLU.
      last_norm: whether BatchNorm stands on the outputs.
    """

    inputs: int
    width: int
    depth: int
    outputs: int
    weight_variance: float = 2.0
    centered: bool = False
    normalized: bool = False
    last_norm: bool = False

    def init(self, key: jax.Array) -> Params:
        """Raw Gaussian kernels `(inputs, outputs)` in JAX's default precision."""
        sides = [self.inputs, *[self.width] * (self.depth - 1), self.outputs]
        params = {
            f"layer{i + 1}": jax.random.normal(jax.random.fold_in(key, i), (sides[i], sides[i + 1]))
            for i in range(self.depth)
        }
        return {name: self.init_variance((name,), kernel) ** 0.5 * kernel for name, kernel in params.items()}

    def init_variance(self, path: tuple[str, ...], kernel: jax.Array) -> float:
        """Variance of a raw kernel's entries: the theory's weight on its contribution to the tangent kernel.

        Args:
          path: of the kernel.
          kernel: `(inputs, outputs)`.
        """
        return (1.0 if path[-1] == "layer1" else self.weight_variance) / kernel.shape[0]

    def preactivations(self, params: Params, x: jax.Array) -> list[jax.Array]:
        """What every layer hands on before its ReLU, after BatchNorm where there is one.

        Args:
          params: raw kernels.
          x: inputs `(N, n_0)`.

        Returns:
          `depth` arrays, `(N, width)` and the last `(N, outputs)`, the outputs themselves.
        """
        return self.onwards(params, self._handed_on(1, x @ params["layer1"]))

    def onwards(self, params: Params, first: jax.Array) -> list[jax.Array]:
        """`preactivations`, from those of the first layer, `(N, width)`, on.

        Args:
          params: from `init`.
          first: pre-activations of the first layer, `(N, width)`.
        """
        layers = [first]
        for i in range(2, self.depth + 1):
            kernel = params[f"layer{i}"]
            layers.append(self._handed_on(i, relu(layers[-1]) @ (center(kernel) if self.centered else kernel)))
        return layers

    def _handed_on(self, layer: int, z: jax.Array) -> jax.Array:
        return batch_norm(z) if (self.last_norm if layer == self.depth else self.normalized) else z

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """Outputs `(N, outputs)` for inputs `(N, n_0)`.

        Args:
          params: from `init`.
          x: `(N, n_0)`.
        """
        return self.preactivations(params, x)[-1]


def plain(inputs: int, width: int, depth: int, outputs: int) -> RandomMLP:
    """He's initialization.

    Args:
      inputs, width, depth, outputs: as of `RandomMLP`.
    """
    return RandomMLP(inputs, width, depth, outputs)


def weight_mean(inputs: int, width: int, depth: int, outputs: int) -> RandomMLP:
    r"""Centered kernels of the exact variance, $\sigma_w^2 = 2n / ((n-1)(1-1/\pi))$ (Theorem 3).

    Args:
      inputs, width, depth, outputs: as of `RandomMLP`.
    """
    return RandomMLP(inputs, width, depth, outputs, weight_variance=2 * gain(width) ** 2, centered=True)


def batch_normalized(inputs: int, width: int, depth: int, outputs: int) -> RandomMLP:
    """BatchNorm over the batch before every ReLU; the outputs are not normalized.

    Args:
      inputs, width, depth, outputs: as of `RandomMLP`.
    """
    return RandomMLP(inputs, width, depth, outputs, normalized=True)


KINDS: dict[str, Callable[..., RandomMLP]] = {
    "plain": plain,
    "weight mean": weight_mean,
    "BatchNorm": batch_normalized,
}
"""The three MLPs that the theory compares, from inputs, width, depth and outputs, by their name in tables."""
