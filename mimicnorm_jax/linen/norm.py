"""Normalization of logits, the last BatchNorm, and none in the place of the others."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax.functional.logits import (
    RunningVariance,
    batch_statistics,
    check_running_variance,
    check_scale,
    normalize,
    running_averages,
    wide_logits,
)


class IdentityNorm(nn.BatchNorm):
    """Takes what `nn.BatchNorm` takes, fields and call, and does nothing: no parameters, no running averages.

    For networks that are given their norm, such as `ResNet(norm=IdentityNorm)`, and `functools.partial`s of it.

    Attributes:
      dtype: of the output; None for that of the input. No other field does anything.

    Example:
      >>> norm = IdentityNorm(use_running_average=False, momentum=0.9)
      >>> y, variables = norm.init_with_output(jax.random.key(0), jnp.array([[1.0, 5.0]]))
      >>> y.tolist(), variables
      ([[1.0, 5.0]], {})
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """`x` of any shape, as it is."""
        del use_running_average, mask
        return x if self.dtype is None else x.astype(self.dtype)


class LastBatchNorm(nn.Module):
    r"""BatchNorm without learned scale and bias on the logits (section 3.2, "last BN layer").

    $\hat z = s (z - \mu) / \sqrt{\sigma^2 + \epsilon}$ with the batch's mean and biased variance in
    training and their running averages, the variables `batch_stats/mean` and `batch_stats/var`,
    otherwise. Statistics and result are in at least float32.

    Attributes:
      use_running_average: normalize with the running averages and leave them as they are; here or
        in the call.
      axis_name: mapped axis over which the statistics are synchronized, by two pmeans of C numbers.
      epsilon: added to the variance.
      momentum: of the running averages, in Flax's convention: `new = 0.9 old + 0.1 batch`.
      running_variance: `biased` (Flax's convention) or `unbiased` (PyTorch's: times B / (B - 1))
        variance in the running average.
      scale: s, a constant; the paper has 1. The larger, the surer a network can become, and the larger its gradient;
        `functional.cross_entropy_floor` says how sure, which is not very for few classes.
    """

    use_running_average: bool | None = None
    axis_name: str | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    running_variance: RunningVariance = "biased"
    scale: float = 1.0

    @nn.compact
    def __call__(self, logits: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalizes logits.

        Args:
          logits: `(B, C)`.
          use_running_average: see the attribute.

        Returns:
          `(B, C)`, in at least float32.

        Raises:
          ValueError: for logits that are not a matrix, for an unknown `running_variance`, for a `scale` that is
            not positive, and in training for a batch of one, which has no variance. A program exported for a symbolic
            batch gives NaN for a batch of one instead.
        """
        use_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        check_running_variance(self.running_variance)
        check_scale(self.scale)
        z = wide_logits(logits)
        classes = z.shape[1]
        mean_average = self.variable("batch_stats", "mean", jnp.zeros, (classes,), z.dtype)
        var_average = self.variable("batch_stats", "var", jnp.ones, (classes,), z.dtype)
        if use_average:
            return normalize(z, mean_average.value, var_average.value, self.epsilon, self.scale)
        batch = batch_statistics(z, self.axis_name, initializing=self.is_initializing())
        if not self.is_initializing():
            mean_average.value, var_average.value = running_averages(
                mean_average.value, var_average.value, batch, self.momentum, self.running_variance
            )
        return normalize(z, batch.mean, batch.var, self.epsilon, self.scale)
