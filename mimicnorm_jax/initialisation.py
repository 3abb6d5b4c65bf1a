"""How kernels and residual scalars start: the published roundings, the exact gain, the text, plain He."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mimicnorm_jax import centring


@dataclass(frozen=True)
class Kernel:
    """What an initialisation may depend on.

    Attributes:
      shape: the kernel's shape, `(*window, n_in / groups, n_out)`.
      centred: whether the layer centres it.
    """

    shape: tuple[int, ...]
    centred: bool

    @property
    def gain(self) -> float:
        """The exact gain (Theorem 3) of a centred kernel, 1 of any other."""
        return centring.gain(centring.fan_in(self.shape)) if self.centred else 1.0


@dataclass(frozen=True)
class Published:
    """What the published code does in one architecture (CIFAR networks).

    Attributes:
      kernel_variance: numerator of the kernels' variance.
      min_channels: the fan-in of that variance counts at least this many input channels.
      idle_bias: whether the BatchNorm version keeps its convolutions' biases, which do nothing.
    """

    kernel_variance: float = 2.0
    min_channels: int = 1
    idle_bias: bool = False


@dataclass(frozen=True)
class Scheme:
    """One way to initialise every network.

    Attributes:
      name: as in `SCHEMES`.
      summary: one line for a reader choosing.
      kernel_variance: numerator of a kernel's variance.
      clips_fan_in: whether the published minimum of input channels holds.
      gain: what one kernel contributes to the scalar that follows it.
      depth: the divisor of the scalar of the l-th residual block, l = 1, 2, ...
    """

    name: str
    summary: str
    kernel_variance: Callable[[Published, Kernel], float]
    clips_fan_in: bool
    gain: Callable[[Kernel], float]
    depth: Callable[[int], float]

    def kernel_stddev(self, published: Published, kernel: Kernel) -> float:
        """Standard deviation of the normal distribution that a convolution kernel is drawn from."""
        *window, channels, _ = kernel.shape
        fan_in = math.prod(window) * max(channels, published.min_channels if self.clips_fan_in else 1)
        return math.sqrt(self.kernel_variance(published, kernel) / fan_in)

    def scalar(self, covers: Sequence[Kernel], block: int | None = None) -> float:
        """Initial value of a scalar that makes up for the gain of the kernels it covers.

        Args:
          covers: the kernels.
          block: the residual block's running index over the whole net, from 1; None outside one.
        """
        return math.prod(map(self.gain, covers)) / (1.0 if block is None else self.depth(block))


def _exact(published: Published, kernel: Kernel) -> float:
    # Where the published variance is He's, scalars carry the gain.
    return 2 * kernel.gain**2 if published.kernel_variance > 2 else 2.0


_ALL = (
    Scheme(
        "published",
        "the published code: variance 2.8/n or 2/n as the net has it, scalars 1.2^k/l",
        kernel_variance=lambda published, kernel: published.kernel_variance,
        clips_fan_in=True,
        gain=lambda kernel: centring.PUBLISHED_GAIN,
        depth=float,
    ),
    Scheme(
        "exact",
        "the published layout with Theorem 3's gain g instead of its roundings: 2g^2/n, scalars g^k/l",
        kernel_variance=_exact,
        clips_fan_in=False,
        gain=lambda kernel: kernel.gain,
        depth=float,
    ),
    Scheme(
        "text",
        "the paper's text: variance 2g^2/n of every centred kernel, residual scalars 1/sqrt(l)",
        kernel_variance=lambda published, kernel: 2 * kernel.gain**2,
        clips_fan_in=False,
        gain=lambda kernel: 1.0,
        depth=math.sqrt,
    ),
    Scheme(
        "he",
        "plain He: variance 2/n, residual scalars 1/l",
        kernel_variance=lambda published, kernel: 2.0,
        clips_fan_in=False,
        gain=lambda kernel: 1.0,
        depth=float,
    ),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}
"""Every initialisation by name."""
