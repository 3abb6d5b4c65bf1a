"""Turns a method's record into layers: an architecture asks for a layer in a role, never for a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from mimicnorm_jax.functional import activations, kernels
from mimicnorm_jax.functional.pooling import max_pool
from mimicnorm_jax.init_schemes import InitScheme, KernelSpec, PublishedInit
from mimicnorm_jax.linen.dropout import Dropout
from mimicnorm_jax.linen.layers import CenteredDense, LastBatchNorm
from mimicnorm_jax.linen.remat import NO_REMAT, Part, rematerialize
from mimicnorm_jax.methods import Method
from mimicnorm_jax.models.branch import Branch, ScalarBias, ScaledReLU
from mimicnorm_jax.models.conv_unit import ConvNorm
from mimicnorm_jax.models.head import LAST_BN


def scale_width(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to an even number of at least 2."""
    return max(2, 2 * round(channels * width / 2))


@dataclass(frozen=True)
class LayerFactory:
    """Makes an architecture's layers for one method. Layer names do not depend on the method.

    Attributes:
      method, scheme, published: what to build, how it starts, and the architecture's constants.
      rule: which kernels a centering method centers.
      dtype: of activations.
      param_dtype: of parameters.
      axis_name: mapped axis over which BatchNorms are synchronized, or None.
      batch_axis_name: mapped axis over which a batch is spread, or None; see `Dropout`.
      center_in_call: False leaves centering to `centering.keep_kernels_centered`.
      running_variance: as in `LastBatchNorm`.
      remat: one of `remat.REMATS`.
    """

    unit: ClassVar[type[ConvNorm]] = ConvNorm

    method: Method
    scheme: InitScheme
    published: PublishedInit
    rule: kernels.Rule = kernels.PUBLISHED_CIFAR_RULE
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    batch_axis_name: str | None = None
    center_in_call: bool = True
    running_variance: Literal["biased", "unbiased"] = "biased"
    remat: str = NO_REMAT

    def part(self, function: Part) -> Part:
        """A part `(module, x) -> x` of a network, such as a stage, recomputed in the backward pass as `remat` says.

        What is marked as saved: outputs of ReLUs but those called cheap, what `save` marks, and, where BatchNorm
        follows them, outputs of convolutions.
        """
        return rematerialize(function, self.remat)

    def save(self, x: jax.Array) -> jax.Array:
        """Marks a map that no ReLU follows, as one that `remat="cheap"` keeps."""
        return x if self.method.batch_norm else checkpoint_name(x, activations.SAVED)

    def conv(
        self,
        features: int,
        window: int,
        *,
        name: str,
        strides: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = True,
        norm: bool = True,
        covers: Sequence[tuple[tuple[int, ...], int]] | None = None,
        branch: Branch | None = None,
        untouched: bool = False,
    ) -> ConvNorm:
        """A convolution with a square window.

        Args:
          features: output channels.
          window: side of the window.
          name: of the unit.
          strides: in both directions.
          padding: on each side; by default half the window.
          groups: of the convolution.
          bias: whether it has a bias, where the method has biases.
          norm: False where even BatchNorm nets have none (a classifier).
          covers: kernels `(shape, groups)` whose gain a learnable scalar of this unit makes up
            for, in methods with such scalars; None for no scalar.
          branch: the residual branch that it belongs to, unless it ends it.
          untouched: whether the published baselines (Fixup, BatchNorm) never initialize it.
        """
        return self._unit(
            features,
            window,
            name=name,
            strides=strides,
            padding=window // 2 if padding is None else padding,
            groups=groups,
            bias=bias,
            norm=norm,
            scale=self._gain_scalar(covers),
            fixup_scale=branch.fixup_scale if branch else 1.0,
            fixup_bias=True,
            untouched=untouched,
        )

    def branch_end(self, features: int, window: int, *, name: str, branch: Branch, bias: bool = True) -> ConvNorm:
        """The last convolution of a residual branch, with the scalar of the branch."""
        scale = None
        if self.method.gain_scalars:
            scale = self.scheme.scalar([self._kernel(*kernel) for kernel in branch.kernels], branch.block)
        elif self.method.zero_scalars:
            scale = 0.0
        elif self.method.fixup:
            scale = 1.0
        return self._unit(
            features,
            window,
            name=name,
            padding=window // 2,
            bias=bias,
            scale=scale,
            fixup_scale=0.0,
            fixup_bias=True,
        )

    def shortcut(
        self,
        features: int,
        *,
        name: str,
        strides: int,
        bias: bool = True,
        covers: Sequence[tuple[tuple[int, ...], int]] | None = None,
    ) -> ConvNorm:
        """The pointwise convolution on a residual block's shortcut; `covers` as in `conv`."""
        return self._unit(features, 1, name=name, strides=strides, bias=bias, scale=self._gain_scalar(covers))

    def _gain_scalar(self, covers: Sequence[tuple[tuple[int, ...], int]] | None) -> float | None:
        if covers is None or not self.method.gain_scalars:
            return None
        return self.scheme.scalar([self._kernel(*kernel) for kernel in covers])

    def shift(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """What stands before a branch's convolutions and the classifier: Fixup's scalar bias."""
        return ScalarBias(self.param_dtype, name=name) if self.method.fixup else lambda x: x

    def branch_relu(self, name: str) -> ScaledReLU:
        """ShuffleNetV2's ReLU at the end of a residual branch, with its scale and bias where scalars are."""
        return ScaledReLU(self.method.gain_scalars, self.param_dtype, name=name)

    def relu(self, x: jax.Array, *, reused: bool = True, cheap: bool = False) -> jax.Array:
        """ReLU.

        Args:
          x: what comes out of a convolution, its BatchNorm or a sum.
          reused: whether a convolution reads the output, which is then kept anyway.
          cheap: whether a pointwise convolution that does not narrow gives the output again.
        """
        relu = activations.relu if reused else activations.relu_save_mask
        return relu(x, saved=not cheap and not self.method.batch_norm)

    def relu6(self, x: jax.Array, *, reused: bool = True, cheap: bool = False) -> jax.Array:
        """ReLU6 where BatchNorm keeps activations in its range, ReLU elsewhere; arguments as in `relu`."""
        if self.method.batch_norm:
            return activations.relu6(x, saved=False)
        return self.relu(x, reused=reused, cheap=cheap)

    def max_pool(self, x: jax.Array, window: int = 2, padding: int = 0) -> jax.Array:
        """Max-pooling with a square window and stride 2."""
        return max_pool(x, (window, window), (2, 2), padding)

    def dropout(self, rate: float, train: bool, *, name: str) -> Callable[[jax.Array], jax.Array]:
        """Dropout whose mask the backward pass draws again from its key."""
        return nn.remat(Dropout)(rate, self.batch_axis_name, name=name) if train else lambda x: x

    def dense(self, features: int, *, name: str) -> nn.Dense:
        """A hidden dense layer: never centered."""
        return self._dense(features, name, self.scheme.dense(self.published))

    def classifier(self, num_classes: int) -> nn.Dense:
        """The dense layer of the logits: as `dense`; Fixup starts it at zero."""
        if self.method.fixup:
            return self._dense(num_classes, "classifier", initializers.zeros)
        return self.dense(num_classes, name="classifier")

    def logits(self, x: jax.Array, train: bool) -> jax.Array:
        """The last BatchNorm, where the method has one; logits are at least float32."""
        if self.method.last_batch_norm:
            return self.last_batch_norm(train)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def last_batch_norm(self, train: bool) -> LastBatchNorm:
        """The last BatchNorm itself; its variables stand under `LAST_BN` in the network's."""
        return LastBatchNorm(not train, self.axis_name, running_variance=self.running_variance, name=LAST_BN)

    def centers(self, shape: Sequence[int], groups: int = 1) -> bool:
        """Whether the architecture's rule takes the kernel, whatever the method does with it."""
        return self.rule(shape, groups)

    def _kernel(self, shape: Sequence[int], groups: int) -> KernelSpec:
        return KernelSpec(tuple(shape), self.method.centers and self.centers(shape, groups), groups)

    def _dense(self, features: int, name: str, kernel_init: initializers.Initializer) -> nn.Dense:
        # For the kernel's cast to `dtype`, which is recomputed in the backward pass.
        return CenteredDense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            rule=kernels.never,
            name=name,
        )

    def _unit(
        self,
        features: int,
        window: int,
        *,
        name: str,
        bias: bool,
        strides: int = 1,
        padding: int = 0,
        groups: int = 1,
        norm: bool = True,
        scale: float | None = None,
        fixup_scale: float = 1.0,
        fixup_bias: bool = False,
        untouched: bool = False,
    ) -> ConvNorm:
        def kernel_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
            kernel = replace(self._kernel(shape, groups), untouched=untouched)
            if self.method.fixup:
                return self.scheme.fixup_conv(kernel, fixup_scale)(key, shape, dtype)
            return self.scheme.conv(self.published, kernel)(key, shape, dtype)

        normalized = norm and self.method.batch_norm
        return self.unit(
            factory=self,
            features=features,
            window=window,
            strides=strides,
            padding=padding,
            groups=groups,
            use_bias=(self.published.keep_conv_bias if normalized else bias) and not self.method.fixup,
            scalar_bias=fixup_bias and self.method.fixup,
            batch_norm=normalized,
            scale=scale,
            kernel_init=kernel_init,
            name=name,
        )
