r"""Stacks of layers whose Fisher information `fisher` bounds: dense or convolutional, with BatchNorm or without.

The setting of Wei, Stokes & Schwab 2019 (arXiv 1903.02606): ReLU, kernels of variance $\sigma_w^2$ over the fan-in and
biases of variance $\sigma_b^2$ in every layer but the last, which is linear and has none; BatchNorm with scale $\gamma$
and shift 0 after every linear map but the last.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mimicnorm_jax.functional.activations import relu

Params = dict[str, jax.Array]
"""Kernels `(window, window, c_in, c_out)` as `layer1`, `layer2`, ..., and biases `(c_out,)` as `bias1`, ..."""


@dataclass(frozen=True)
class Stack:
    r"""A stack of layers, as a theory sees it and, by `init` and `apply`, at finite width.

    Attributes:
      channels: $C_0$ of the inputs, then of every layer but the last.
      outputs: of the last layer.
      side: of the square images; 1 for a dense stack.
      window: side of the kernels; 1 for a dense stack.
      strides: of the convolutions, which are not padded.
      pooled: whether the last layer sees the mean over the positions; otherwise all of them, each with weights of its
        own.
      weight_variance: $\sigma_w^2$.
      bias_variance: $\sigma_b^2$; 0 for a stack without biases.
      gamma: BatchNorm's scale, which is no parameter here; None for a stack without BatchNorm.
      differentiated: whether derivatives go through BatchNorm's statistics, as in training; the theory holds these
        fixed.
    """

    channels: tuple[int, ...]
    outputs: int = 1
    side: int = 1
    window: int = 1
    strides: int = 1
    pooled: bool = False
    weight_variance: float = 2.0
    bias_variance: float = 0.0
    gamma: float | None = None
    differentiated: bool = True

    @property
    def depth(self) -> int:
        """Number of weight layers, L."""
        return len(self.channels)

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the image and of the map that every layer but the last gives, L of them.

        Raises:
          ValueError: if the image is too small.
        """
        sides = [self.side]
        for _ in self.channels[1:]:
            sides.append((sides[-1] - self.window) // self.strides + 1)
        if sides[-1] < 1 or self.side < 1:
            raise ValueError(
                f"side is {self.side}: {self.depth - 1} convolutions of window {self.window} and strides "
                f"{self.strides} leave nothing of it"
            )
        return tuple(sides)

    @property
    def fan_ins(self) -> tuple[int, ...]:
        """$N_{l-1} = C_{l-1} |F_l|$ of every layer."""
        *before, last = self.channels
        head = last if self.pooled else last * self.sides[-1] ** 2
        return (*(channels * self.window**2 for channels in before), head)

    def init(self, key: jax.Array) -> Params:
        """Gaussian parameters, a tree of kernels by name, in JAX's default precision."""
        params = {}
        sizes = (*self.channels, self.outputs)
        for i, fan_in in enumerate(self.fan_ins):
            kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
            last = i == self.depth - 1
            window = (1 if self.pooled else self.sides[-1]) if last else self.window
            shape = (window, window, *sizes[i : i + 2])
            params[f"layer{i + 1}"] = (self.weight_variance / fan_in) ** 0.5 * jax.random.normal(kernel_key, shape)
            if self.bias_variance and not last:
                params[f"bias{i + 1}"] = self.bias_variance**0.5 * jax.random.normal(bias_key, shape[-1:])
        return params

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """Outputs `(N, outputs)` for images `(N, side, side, C_0)`, or vectors `(N, C_0)` of a dense stack.

        Args:
          params: from `init`.
          x: images or vectors.
        """
        x = x.reshape(len(x), self.side, self.side, self.channels[0])
        for i in range(1, self.depth):
            z = _linear(x, params[f"layer{i}"], self.strides)
            z = z + params[f"bias{i}"][None, None, None] if self.bias_variance else z
            x = relu(z if self.gamma is None else self.gamma * self._normalized(z))
        x = x.mean((1, 2), keepdims=True) if self.pooled else x
        return jnp.tensordot(x, params[f"layer{self.depth}"], 3)

    def _normalized(self, z: jax.Array) -> jax.Array:
        """BatchNorm over batch and positions, without epsilon."""
        mean, variance = (f(z, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        if not self.differentiated:
            mean, variance = jax.lax.stop_gradient((mean, variance))
        return (z - mean) / jnp.sqrt(variance)


def _linear(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    if kernel.shape[:2] == (1, 1):
        return x[:, ::strides, ::strides] @ kernel[0, 0]
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), "VALID", dimension_numbers=numbers)
