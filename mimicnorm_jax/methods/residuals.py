"""What a method does to residual branches and the scalars around them: one small object a rule."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jax.nn import initializers

from mimicnorm_jax.init_schemes import Distribution, InitScheme, PublishedInit
from mimicnorm_jax.methods.branch import Branch, Site


@dataclass(frozen=True)
class Residual:
    """Branches as they are, and the base of all rules.

    Attributes:
      needs_sums: whether the rule says nothing about a network without residual sums.
      for_resnets: whether it is written for the branches of ResNets only.
      scalar_biases: whether scalar biases stand behind convolutions, in place of their biases.
      front_biases: whether scalar biases stand before a branch's convolutions and the classifier.
      scales_relu: whether a ReLU that ends a concatenated branch has a learnable scale and bias.
      folded: whether such a scale is but a sign, its size folded into the convolution before.
      channel_gains: whether every convolution's kernel and bias have a learnable factor by channel, from 1.
      alpha: the constant on a branch that is summed, where a rule has one; else 0.
    """

    needs_sums: ClassVar[bool] = False
    for_resnets: ClassVar[bool] = False
    scalar_biases: ClassVar[bool] = False
    front_biases: bool = False
    scales_relu: bool = False
    folded: bool = False
    channel_gains: bool = False
    alpha: float = 0.0

    @property
    def scales_convolutions(self) -> bool:
        """Whether it puts factors on outputs of convolutions, which a norm behind them would divide away."""
        own = type(self)
        return self.channel_gains or own.scalar is not Residual.scalar or own.output_scale is not Residual.output_scale

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        """Initial value of the learnable scalar on a convolution's output; None for no scalar.

        Args:
          scheme: how it starts.
          site: the convolution's.
          compensates: whether the published nets have a scalar here that makes up for `site.kernels`.
        """
        return None

    def kernel_init(self, scheme: InitScheme, published: PublishedInit, site: Site) -> Distribution:
        """Where a convolution kernel is drawn from.

        Args:
          scheme: of the run.
          published: the network's own scheme.
          site: where in its branch the convolution stands.
        """
        return scheme.conv(published, site.kernel)

    def classifier_init(self, default: initializers.Initializer) -> initializers.Initializer:
        """Where the classifier's kernel is drawn from; `default` as any dense layer's."""
        return default

    def input_scale(self, site: Site) -> float:
        """A constant factor on what a convolution reads; it is folded into the kernel."""
        return 1.0

    def output_scale(self, site: Site) -> float:
        """A constant factor on a convolution's output; it is folded into kernel and bias."""
        return 1.0

    def block_scale(self, sums: int) -> float:
        """A constant factor on the input of a block that takes its sign, so that no kernel can have the factor.

        Args:
          sums: as in `Branch`.
        """
        return 1 / math.sqrt(1 + sums * self.alpha**2)


@dataclass(frozen=True)
class GainScalars(Residual):
    """The published learnable scalars, which make up for the gain of centered kernels and for depth (section 3.3)."""

    scales_relu: bool = True

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        if site.role == "residual_out" and site.branch is not None:
            return scheme.scalar(site.kernels, site.branch.block)
        return scheme.scalar(site.kernels) if compensates else None


@dataclass(frozen=True)
class DepthScalars(Residual):
    """A learnable scalar on each summed branch that makes up for depth alone: no gain, where no ReLU is."""

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        if site.role == "residual_out" and site.branch is not None:
            return scheme.scalar((), site.branch.block)
        return None


@dataclass(frozen=True)
class SkipInit(Residual):
    """Summed branches times a learnable scalar that starts at 0 (De & Smith 2020)."""

    needs_sums = True

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        return 0.0 if site.role == "residual_out" else None


@dataclass(frozen=True)
class Fixup(Residual):
    """Branches whose last kernel starts at 0 and the others small, and scalar biases (Zhang et al. 2019)."""

    needs_sums = True
    for_resnets = True
    scalar_biases = True
    front_biases: bool = True

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        return 1.0 if site.role == "residual_out" else None

    def kernel_init(self, scheme: InitScheme, published: PublishedInit, site: Site) -> Distribution:
        if site.role == "residual_out":
            return scheme.fixup_conv(site.kernel, 0.0)
        inside = site.role == "conv" and site.branch is not None
        return scheme.fixup_conv(site.kernel, fixup_scale(site.branch) if inside and site.branch else 1.0)

    def classifier_init(self, default: initializers.Initializer) -> initializers.Initializer:
        return initializers.zeros


def fixup_scale(branch: Branch) -> float:
    """Fixup's factor L^(-1/(2m-2)) on the standard deviation of all kernels of a branch but the last.

    Example:
      >>> fixup_scale(Branch(block=1, blocks=16, length=2))
      0.25
    """
    return branch.blocks ** (-1 / (2 * branch.length - 2))


@dataclass(frozen=True)
class AlphaBeta(Residual):
    r"""Sums whose variance is known: $x + \alpha s f(x / \beta)$ (NF-ResNets, Brock, De, Smith 2021).

    f keeps variance 1, so a sum adds $\alpha^2$ to that of its input, and $\beta$ is the root of what it then expects:
    1 where a convolution made the input, and $\alpha^2$ more for each sum since. s is learnable and starts at 0. Our
    networks have a ReLU behind the sum where NF-ResNets have none: what is expected is then an upper bound, since a
    ReLU makes no variance larger.

    Attributes:
      alpha: the constant on a branch.
      skip_gain: where s starts; None for no s.
    """

    alpha: float = 0.2
    skip_gain: float | None = 0.0
    needs_sums = True

    def scalar(self, scheme: InitScheme, site: Site, compensates: bool) -> float | None:
        return self.skip_gain if site.role == "residual_out" else None

    def input_scale(self, site: Site) -> float:
        if site.branch is None or not site.starts_block:
            return 1.0
        return self.block_scale(site.branch.sums)

    def output_scale(self, site: Site) -> float:
        return self.alpha if site.role == "residual_out" else 1.0


PLAIN = Residual()
"""Branches as they are."""
