"""Flax linen layers: convolution and dense layers with centered kernels, and the last BatchNorm."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.nn.initializers import Initializer

from mimicnorm_jax.functional import kernels
from mimicnorm_jax.functional.row_major import row_major


class _Arrays:
    """A layer's options beside given arrays as its parameters: all that Flax's code of the layer reads.

    Not a module, so that Flax runs this code as a plain function and neither counts nor intercepts a second call. The
    bias is only cast: it is added outside of the checkpoint, where XLA fuses its gradient with the mask of the ReLU
    behind, instead of reading that map once more.
    """

    use_bias = False

    def __init__(self, layer: nn.Module, kernel: jax.Array, bias: jax.Array | None) -> None:
        self._layer, self._kernel, self.bias = layer, kernel, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, name: str, *_: Any) -> jax.Array | None:
        return {"kernel": self._kernel}[name]

    def promote_dtype(self, inputs: jax.Array, kernel: jax.Array, bias: None, **options: Any) -> tuple[Any, ...]:
        inputs, kernel, self.bias = self._layer.promote_dtype(inputs, kernel, self.bias, **options)
        return inputs, row_major(kernel), bias


class _CenteredKernel(nn.Module):
    """Transforms kernel and bias where the layer reads them; the raw kernel is what is stored."""

    rule: kernels.Rule = kernels.always
    scale_init: Initializer | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        """The layer's output; `factor`, a scalar `()`, multiplies kernel and bias and costs no activation memory."""
        layer: Any = self  # the options are those of the Flax layer beside this class
        window, groups = getattr(layer, "kernel_size", ()), getattr(layer, "feature_group_count", 1)
        window = (window,) if isinstance(window, int) else tuple(window)
        shape = (*window, jnp.shape(inputs)[-1] // groups, layer.features)
        # Flax's names and order, and the scalar last: the random numbers are those of the plain layer.
        kernel = self.param("kernel", layer.kernel_init, shape, layer.param_dtype)
        bias = self.param("bias", layer.bias_init, (layer.features,), layer.param_dtype) if layer.use_bias else None
        scale = None if self.scale_init is None else self.param("scale", self.scale_init, (), layer.param_dtype)
        centered = self.rule(shape, groups)
        plain: Any = super().__call__

        # The derivative of a product needs its factors, not the product: the backward pass recomputes the transformed,
        # cast kernel from the raw one, which is there anyway, and no convolution.
        @jax.checkpoint
        def product(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, *factors: jax.Array) -> Any:
            kernel = kernels.center(kernel) if centered else kernel
            for one in factors:
                kernel, bias = kernel * one, None if bias is None else bias * one
            arrays = _Arrays(self, kernel, bias)
            return plain.__func__(arrays, inputs), arrays.bias

        y, bias = product(inputs, kernel, bias, *(one for one in (scale, factor) if one is not None))
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


class CenteredConv(_CenteredKernel, nn.Conv):
    """`nn.Conv` that convolves with `center(kernel)`: every option of `nn.Conv`, and two more.

    The raw kernel is the parameter; centering (section 3.1) is a pure transform of it at every call,
    so gradients are those of the raw kernel and sum to zero over each output channel's fan-in. A
    `mask` applies to the centered kernel.

    Attributes:
      rule: whether to center, asked with the kernel's shape and the layer's groups. The default is
        the published CIFAR code's: fan-in above 50.
      scale_init: initializer of a learnable scalar, the parameter `scale`, folded into kernel and
        bias (appendix C) so that it costs no activation memory; None for no scalar.

    Example:
      >>> layer = CenteredConv(8, (3, 3), scale_init=nn.initializers.constant(1.2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 16)))
      >>> y = layer.apply(variables, jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """

    rule: kernels.Rule = kernels.PUBLISHED_CIFAR_RULE


class CenteredDense(_CenteredKernel, nn.Dense):
    """`nn.Dense` that multiplies with `center(kernel)`: every option of `nn.Dense`, and two more.

    The published conv nets leave their dense layers uncentered; the theory section centers them.

    Attributes:
      rule: whether to center, asked with the kernel's shape; by default always.
      scale_init: as in `CenteredConv`.
    """


class LastBatchNorm(nn.Module):
    r"""BatchNorm without scale and bias on the logits (section 3.2, "last BN layer").

    $\hat z = (z - \mu) / \sqrt{\sigma^2 + \epsilon}$ with the batch's mean and biased variance in
    training and their running averages, the variables `batch_stats/mean` and `batch_stats/var`,
    otherwise. Statistics and result are in at least float32.

    Attributes:
      use_running_average: normalize with the running averages and leave them as they are; here or
        in the call.
      axis_name: mapped axis over which the statistics are synchronized, by one pmean of 2C numbers.
      epsilon: added to the variance.
      momentum: of the running averages, in Flax's convention: `new = 0.9 old + 0.1 batch`.
      running_variance: `biased` (Flax's convention) or `unbiased` (PyTorch's: times B / (B - 1))
        variance in the running average.
    """

    use_running_average: bool | None = None
    axis_name: str | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    running_variance: Literal["biased", "unbiased"] = "biased"

    @nn.compact
    def __call__(self, logits: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalizes logits.

        Args:
          logits: `(B, C)`.
          use_running_average: see the attribute.

        Returns:
          `(B, C)`, in at least float32.

        Raises:
          ValueError: for logits that are not a matrix, for an unknown `running_variance`, and in
            training for a batch of one, which has no variance. A program exported for a symbolic batch gives NaN for
            a batch of one instead.
        """
        use_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if logits.ndim != 2:
            raise ValueError(f"LastBatchNorm normalizes logits of shape (B, C); got {logits.shape}")
        if self.running_variance not in ("biased", "unbiased"):
            raise ValueError(f"running_variance is 'biased' or 'unbiased'; got {self.running_variance!r}")
        z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        classes = z.shape[1]
        mean_average = self.variable("batch_stats", "mean", jnp.zeros, (classes,), z.dtype)
        var_average = self.variable("batch_stats", "var", jnp.ones, (classes,), z.dtype)
        if use_average:
            mean, var = mean_average.value, var_average.value
        else:
            mean, var, count = self._batch_statistics(z)
            if not self.is_initializing():
                shown = var * count / (count - 1) if self.running_variance == "unbiased" else var
                mean_average.value = self.momentum * mean_average.value + (1 - self.momentum) * mean
                var_average.value = self.momentum * var_average.value + (1 - self.momentum) * shown
        return (z - mean[None]) * lax.rsqrt(var + self.epsilon)[None]

    def _batch_statistics(self, z: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        mean, var, count = z.mean(0), z.var(0), z.shape[0]
        if self.axis_name is not None and not self.is_initializing():
            second_moment = var + mean**2
            mean, second_moment = lax.pmean(jnp.stack([mean, second_moment]), self.axis_name)
            # Rounding can leave a difference of moments below zero.
            var = jnp.maximum(second_moment - mean**2, 0)
            count *= lax.axis_size(self.axis_name)
        if not isinstance(count, int):  # symbolic, as `jax.export` may have it: known when the program runs
            var = jnp.where(jnp.asarray(count) < 2, jnp.nan, var)
        elif count < 2 and not self.is_initializing():
            raise ValueError(
                "LastBatchNorm cannot normalize a training batch of 1: use a larger batch, or the "
                "running averages (use_running_average=True)"
            )
        return mean, var, count
