"""Normalization of logits: the last BatchNorm."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


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
