"""Turns a method's record into layers: an architecture asks for a layer in a role, never for a method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from mimicnorm_jax.functional import activations
from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule
from mimicnorm_jax.init_schemes import InitScheme, PublishedInit
from mimicnorm_jax.linen.conv import TransformedDense
from mimicnorm_jax.linen.remat import NO_REMAT, Part, rematerialize
from mimicnorm_jax.linen.scalars import ScalarBias, ScaledReLU
from mimicnorm_jax.methods import Method
from mimicnorm_jax.methods.norms import NormOptions
from mimicnorm_jax.models.head import LAST_BN


def scale_width(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to an even number of at least 2."""
    return max(2, 2 * round(channels * width / 2))


@dataclass(frozen=True)
class LayerFactory:
    """Makes an architecture's layers for one method. Layer names do not depend on the method.

    Its convolutions are `models.conv_norm.ConvNorm`, which read its attributes.

    Attributes:
      method, scheme, published: what to build, how it starts, and the architecture's constants.
      rule: which kernels the published code centers in this architecture.
      dtype: of activations.
      param_dtype: of parameters.
      axis_name: mapped axis over which BatchNorms are synchronized, or None.
      batch_axis_name: mapped axis over which a batch is spread, or None; see `Dropout`.
      center_in_call: False leaves centering to `optim.keep_kernels_centered`.
      running_variance: as in `LastBatchNorm`.
      remat: one of `linen.REMATS`.
      recompute_kernel: as in `TransformedKernel`; False is what Flax's own layers do.
    """

    method: Method
    scheme: InitScheme
    published: PublishedInit
    rule: Rule = PUBLISHED_CIFAR_RULE
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    batch_axis_name: str | None = None
    center_in_call: bool = True
    running_variance: Literal["biased", "unbiased"] = "biased"
    remat: str = NO_REMAT
    recompute_kernel: bool = True

    def part(self, function: Part) -> Part:
        """A part `(module, x) -> x` of a network, such as a stage, recomputed in the backward pass as `remat` says.

        What is marked as saved: outputs of ReLUs but those called cheap, what `save` marks, and, where a norm
        follows them, outputs of convolutions.
        """
        return rematerialize(function, self.remat)

    def joined(self, function: Part) -> Part:
        """A part `(module, maps) -> x` that concatenates maps, all of which are kept, and convolves them.

        The backward pass concatenates them again; where a norm stands between, which would be computed again too, the
        part is left as it is.
        """
        return function if self.method.norm is not None else rematerialize(function, "stage")

    def save(self, x: jax.Array) -> jax.Array:
        """Marks a map `(B, H, W, C)` that no ReLU follows, as one that `remat="cheap"` keeps."""
        return x if self.method.norm is not None else checkpoint_name(x, activations.SAVED)

    def norm(self, train: bool) -> Callable[[jax.Array], jax.Array]:
        """What normalizes behind a convolution; raises ValueError for a method without."""
        if self.method.norm is None:
            raise ValueError(f"the method {self.method.name} has no norm between layers")
        return self.method.norm(train, NormOptions(self.dtype, self.param_dtype, self.axis_name))

    def residual_in(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """What stands before a branch's convolutions and the classifier: Fixup's scalar bias."""
        return ScalarBias(self.param_dtype, name=name) if self.method.residual.front_biases else lambda x: x

    def branch_relu(self, name: str) -> ScaledReLU:
        """ShuffleNetV2's ReLU at the end of a concatenated branch, with its scale and bias where scalars are."""

        def relu(x: jax.Array) -> jax.Array:
            return self.relu(x, output_saved_anyway=False, cheap=True)

        residual = self.method.residual
        return ScaledReLU(residual.scales_relu, self.param_dtype, relu, sign_only=residual.folded, name=name)

    def relu(
        self, x: jax.Array, *, output_saved_anyway: bool = True, cheap: bool = False, rectified: bool = False
    ) -> jax.Array:
        """ReLU.

        Args:
          x: what comes out of a convolution, its norm or a sum, of any shape.
          output_saved_anyway: whether a convolution reads the output, which is then kept anyway.
          cheap: whether a pointwise convolution that does not narrow gives the output again.
          rectified: whether x is the sum of a ReLU's output and a branch, over an identity shortcut.
        """
        saved = not cheap and self.method.norm is None
        return self.method.activation.relu(x, output_saved_anyway=output_saved_anyway, saved=saved, rectified=rectified)

    def relu6(self, x: jax.Array, *, output_saved_anyway: bool = True, cheap: bool = False) -> jax.Array:
        """ReLU6 where a norm keeps activations in its range, or did before it was folded; else ReLU; see `relu`.

        Args:
          x: what comes out of a norm, of any shape.
          output_saved_anyway, cheap: as in `relu`.
        """
        if self.method.norm is not None or self.method.relu6:
            return self.method.activation.relu6(x)
        return self.relu(x, output_saved_anyway=output_saved_anyway, cheap=cheap)

    def max_pool(self, x: jax.Array, window: int = 2, padding: int = 0) -> jax.Array:
        """Max-pooling with a square window and stride 2.

        Args:
          x: maps, `(B, H, W, C)`.
          window: its side.
          padding: pixels at each side.
        """
        return self.method.activation.max_pool(x, window, padding)

    def dropout(self, rate: float, train: bool, *, name: str) -> Callable[[jax.Array], jax.Array]:
        """Dropout in training, nothing otherwise.

        Args:
          rate: of what is dropped.
          train: whether it is.
          name: of the layer.
        """
        return self.method.activation.dropout(rate, self.batch_axis_name, name=name) if train else lambda x: x

    def dense(self, features: int, *, name: str) -> nn.Dense:
        """A hidden dense layer: its kernel is never transformed.

        Args:
          features: of its output.
          name: of the layer.
        """
        return self._dense(features, name, self.scheme.dense(self.published))

    def classifier(self, num_classes: int) -> nn.Dense:
        """The dense layer of the logits: as `dense`; Fixup starts it at zero."""
        init = self.method.residual.classifier_init(self.scheme.dense(self.published))
        return self._dense(num_classes, "classifier", init)

    def logits(self, x: jax.Array, train: bool) -> jax.Array:
        """The last BatchNorm, where the method has one; logits are at least float32.

        Args:
          x: what the classifier gives, `(B, num_classes)`.
          train: whether the batch is normalized by its own moments.
        """
        if self.method.last_norm is not None:
            return self.last_batch_norm(train)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def last_batch_norm(self, train: bool) -> nn.Module:
        """The norm on the logits, with its variables under `LAST_BN`; raises ValueError for a method without."""
        if self.method.last_norm is None:
            raise ValueError(f"the method {self.method.name} has no norm on the logits")
        options: dict[str, Any] = {"axis_name": self.axis_name, "running_variance": self.running_variance}
        if self.method.logit_scale != 1.0:  # which a norm of your own need not know
            options["scale"] = self.method.logit_scale
        return self.method.last_norm(use_running_average=not train, name=LAST_BN, **options)

    def _dense(self, features: int, name: str, kernel_init: initializers.Initializer) -> nn.Dense:
        return TransformedDense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            recompute_kernel=self.recompute_kernel,
            name=name,
        )
