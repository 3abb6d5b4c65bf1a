"""A method as one record: what stands around a convolution, by role."""

from collections.abc import Callable
from dataclasses import dataclass

from flax import linen as nn

from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.functional.rules import Rule, fan_in_above
from mimicnorm_jax.functional.transform import IDENTITY, KernelFunction, KernelTransform
from mimicnorm_jax.methods.activations import LEAN, Activation
from mimicnorm_jax.methods.norms import Norm
from mimicnorm_jax.methods.residuals import PLAIN, Residual

LastNorm = Callable[..., nn.Module]
"""Makes the norm on the logits, with the options of `LastBatchNorm`."""


@dataclass(frozen=True)
class ConvTransform:
    """Which of a network's convolutions have their kernel transformed, and how.

    Attributes:
      function: what becomes of the kernel; None for nothing.
      by_published_rule: whether the network's published rule says which, classifiers included; else all convolutions
        are, but classifiers and kernels of fan-in 1, which have no variance.
    """

    function: KernelFunction | None = None
    by_published_rule: bool = False

    def of(self, published: Rule, *, classifier: bool) -> KernelTransform:
        """The transform of a convolution, in a network with this published rule.

        Args:
          published: the network's rule.
          classifier: whether the convolution gives logits.
        """
        if self.function is None or (classifier and not self.by_published_rule):
            return IDENTITY
        return KernelTransform(self.function, published if self.by_published_rule else fan_in_above(1))


RAW = ConvTransform()
"""Kernels as they are."""
CENTERED = ConvTransform(center, by_published_rule=True)
"""Centered kernels (section 3.1), in those convolutions that the published code centers."""


@dataclass(frozen=True)
class Method:
    """What a method does to a network. `models.factory.LayerFactory` turns it into layers.

    Attributes:
      name: as in `METHODS`.
      summary: one line for a reader choosing.
      kernel_transform: which kernels are transformed, and how.
      norm: behind every convolution but a classifier, or None.
      residual: what happens to residual branches, and the scalars around them.
      activation: what stands between layers.
      last_norm: on the logits, or None.
      logit_scale: constant that it multiplies normalized logits by, as `LastBatchNorm.scale`; the paper has 1.
      conv_biases: whether every convolution has a bias, also those that a network leaves without one.
      relu6: whether a network's ReLU6 stays one although no norm keeps activations in its range.
      for_binary: whether it is written for networks of binary convolutions only.
    """

    name: str
    summary: str
    kernel_transform: ConvTransform = RAW
    norm: Norm | None = None
    residual: Residual = PLAIN
    activation: Activation = LEAN
    last_norm: LastNorm | None = None
    logit_scale: float = 1.0
    conv_biases: bool = False
    relu6: bool = False
    for_binary: bool = False

    @property
    def centers(self) -> bool:
        """Whether kernels are centered, which a projection after each step could do as well."""
        return self.kernel_transform.function is center

    @property
    def batch_norm(self) -> bool:
        """Whether norms between layers couple the images of a batch."""
        return self.norm is not None and self.norm.couples_batch

    @property
    def last_batch_norm(self) -> bool:
        """Whether a norm stands on the logits."""
        return self.last_norm is not None
