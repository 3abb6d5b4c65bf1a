"""How kernels and residual scalars start: the published roundings, the exact gain, the text, plain He.

One key draws one kernel, whatever the distribution: normal kernels are multiples of one another, and uniform ones
increasing functions of them. So methods and initializations are compared in pairs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling

from mimicnorm_jax.functional import kernels
from mimicnorm_jax.functional.rules import Rule


@dataclass(frozen=True)
class KernelSpec:
    """What an initialization may depend on.

    Attributes:
      shape: the kernel's shape, `(*window, n_in / groups, n_out)`.
      centered: whether the layer transforms it such that each output channel has mean 0.
      groups: of its convolution.
      untouched: whether the published baselines never initialize it, so that it keeps PyTorch's default.
    """

    shape: tuple[int, ...]
    centered: bool = False
    groups: int = 1
    untouched: bool = False

    @property
    def gain(self) -> float:
        """The exact gain (Theorem 3) of a centered kernel, 1 of any other."""
        return kernels.gain(kernels.fan_in(self.shape)) if self.centered else 1.0


@dataclass(frozen=True)
class Distribution:
    """Where a kernel is drawn from: normal or uniform, of mean 0.

    Attributes:
      stddev: its standard deviation.
      uniform: whether it is uniform.
    """

    stddev: float
    uniform: bool = False

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        """Draws `shape`."""
        if self.uniform:
            # The very uniform numbers that `normal` maps to normal ones.
            return math.sqrt(3) * self.stddev * jax.random.uniform(key, shape, dtype, -1)
        return self.stddev * jax.random.normal(key, shape, dtype)


def pytorch_default(kernel: KernelSpec) -> Distribution:
    """Uniform in +-1/sqrt(fan-in).

    Example:
      >>> round(pytorch_default(KernelSpec((3, 3, 3, 64))).stddev, 4)
      0.1111
    """
    return Distribution(math.sqrt(1 / (3 * kernels.fan_in(kernel.shape))), uniform=True)


def he_fan_in(kernel: KernelSpec) -> Distribution:
    """Variance 2 over the fan-in."""
    return Distribution(math.sqrt(2 / kernels.fan_in(kernel.shape)))


def he_fan_out(kernel: KernelSpec) -> Distribution:
    """Variance 2 over window times output channels."""
    return Distribution(math.sqrt(2 / (math.prod(kernel.shape[:-2]) * kernel.shape[-1])))


def he_ungrouped(kernel: KernelSpec) -> Distribution:
    """Variance 2 over window times all input channels, not only those of a group."""
    return Distribution(math.sqrt(2 / (kernels.fan_in(kernel.shape) * kernel.groups)))


@dataclass(frozen=True)
class PublishedInit:
    """What the published code does in one architecture.

    Attributes:
      kernel_variance: numerator of the kernels' variance.
      min_channels: the fan-in of that variance counts at least this many input channels.
      fan_out: whether that variance is over the fan-out instead, window times output channels.
      keep_conv_bias: whether the BatchNorm version keeps its convolutions' biases, which do nothing.
      batch_norm: where the BatchNorm version's convolution kernels are drawn from; None for the same as the others.
      untouched_dense: whether the BatchNorm version never initializes its dense layers.
      scalar_rule: for which kernels the learnable scalars make up; None for those that are centered.
    """

    kernel_variance: float = 2.0
    min_channels: int = 1
    fan_out: bool = False
    keep_conv_bias: bool = False
    batch_norm: Callable[[KernelSpec], Distribution] | None = None
    untouched_dense: bool = False
    scalar_rule: Rule | None = None

    def fan(self, shape: tuple[int, ...]) -> int:
        """What the variance of a kernel of `shape` is divided by."""
        *window, channels, features = shape
        return math.prod(window) * (features if self.fan_out else max(channels, self.min_channels))


@dataclass(frozen=True)
class InitScheme:
    """One way to initialize every network.

    Attributes:
      name: as in `SCHEMES`.
      summary: one line for a reader choosing.
      kernel_variance: numerator of a kernel's variance.
      published_fan: whether variances are over `PublishedInit.fan`, and not over the fan-in.
      gain: what one kernel contributes to the scalar that follows it.
      depth: the divisor of the scalar of the l-th residual block, l = 1, 2, ...
      leaves_untouched: whether what the published baselines never initialize keeps PyTorch's default.
      batch_norm_only: whether the kernels are those of the published BatchNorm versions.
    """

    name: str
    summary: str
    kernel_variance: Callable[[PublishedInit, KernelSpec], float]
    published_fan: bool
    gain: Callable[[KernelSpec], float]
    depth: Callable[[int], float]
    leaves_untouched: bool = False
    batch_norm_only: bool = False

    def conv(self, published: PublishedInit, kernel: KernelSpec) -> Distribution:
        """Where a convolution kernel is drawn from."""
        if self.batch_norm_only and published.batch_norm is not None:
            return pytorch_default(kernel) if kernel.untouched else published.batch_norm(kernel)
        fan = published.fan(kernel.shape) if self.published_fan else kernels.fan_in(kernel.shape)
        return Distribution(math.sqrt(self.kernel_variance(published, kernel) / fan))

    def fixup_conv(self, kernel: KernelSpec, scale: float) -> Distribution:
        """Likewise under Fixup: He's over the fan-out, its deviation times `scale`."""
        if kernel.untouched and self.leaves_untouched:
            return pytorch_default(kernel)
        return Distribution(scale * he_fan_out(kernel).stddev)

    def dense(self, published: PublishedInit) -> Initializer:
        """Where dense kernels are drawn from: He's distribution, or PyTorch's default, drawn as `Distribution` does."""
        if self.batch_norm_only and published.untouched_dense:
            return variance_scaling(1 / 3, "fan_in", "uniform")
        return variance_scaling(2.0, "fan_in", "normal")

    def scalar(self, gain_kernels: Sequence[KernelSpec], block: int | None = None) -> float:
        """Initial value of a scalar that makes up for the gain of these kernels.

        Args:
          gain_kernels: the kernels.
          block: the residual block's running index over the whole net, from 1; None outside one.
        """
        return math.prod(map(self.gain, gain_kernels)) / (1.0 if block is None else self.depth(block))


def _exact(published: PublishedInit, kernel: KernelSpec) -> float:
    # Where the published variance is He's, scalars carry the gain.
    return 2.0 if published.kernel_variance == 2 else 2 * kernel.gain**2


_ALL = (
    InitScheme(
        "published",
        "the published code: variance 2.8/n or 2/n as the net has it, scalars 1.2^k/l",
        kernel_variance=lambda published, kernel: published.kernel_variance,
        published_fan=True,
        gain=lambda kernel: kernels.PUBLISHED_GAIN,
        depth=float,
        leaves_untouched=True,
    ),
    InitScheme(
        "published_batchnorm",
        "what the published BatchNorm versions start with, each network its own; for method batchnorm",
        kernel_variance=lambda published, kernel: published.kernel_variance,
        published_fan=True,
        gain=lambda kernel: 1.0,
        depth=float,
        batch_norm_only=True,
    ),
    InitScheme(
        "exact",
        "the published layout with Theorem 3's gain g instead of its roundings: 2g^2/n, scalars g^k/l",
        kernel_variance=_exact,
        published_fan=False,
        gain=lambda kernel: kernel.gain,
        depth=float,
    ),
    InitScheme(
        "text",
        "the paper's text: variance 2g^2/n of every centered kernel, residual scalars 1/sqrt(l)",
        kernel_variance=lambda published, kernel: 2 * kernel.gain**2,
        published_fan=False,
        gain=lambda kernel: 1.0,
        depth=math.sqrt,
    ),
    InitScheme(
        "he",
        "plain He: variance 2/n, residual scalars 1/l",
        kernel_variance=lambda published, kernel: 2.0,
        published_fan=False,
        gain=lambda kernel: 1.0,
        depth=float,
    ),
)

SCHEMES: dict[str, InitScheme] = {scheme.name: scheme for scheme in _ALL}
"""Every initialization by name."""
