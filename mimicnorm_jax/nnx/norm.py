"""Normalization of logits, the last BatchNorm, and none in the place of the others."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mimicnorm_jax.functional.logits import (
    RunningVariance,
    batch_statistics,
    check_running_variance,
    check_scale,
    normalize,
    running_averages,
    wide_logits,
)


class IdentityNorm(nnx.BatchNorm):
    """Takes what `nnx.BatchNorm` takes, when it is made and when it is called, and does nothing: no variables.

    Attributes:
      dtype: of the output; None for that of the input.

    Example:
      >>> norm = IdentityNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> norm(jnp.array([[1.0, 5.0]])).tolist(), jax.tree.leaves(nnx.state(norm))
      ([[1.0, 5.0]], [])
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        """Args of `nnx.BatchNorm`.

        Args:
          num_features, options: of `nnx.BatchNorm`.

        Raises:
          TypeError: for what that does not take.
        """
        given = inspect.signature(nnx.BatchNorm.__init__).bind(self, num_features, **{"rngs": None} | options)
        given.apply_defaults()
        self.num_features = num_features
        self.use_running_average = given.arguments["use_running_average"]
        self.dtype = given.arguments["dtype"]

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """`x` of any shape, as it is."""
        del use_running_average, mask
        return x if self.dtype is None else x.astype(self.dtype)


class LastBatchNorm(nnx.Module):
    r"""BatchNorm without learned scale and bias on the logits (section 3.2, "last BN layer").

    $\hat z = s (z - \mu) / \sqrt{\sigma^2 + \epsilon}$ with the batch's mean and biased variance in
    training and their running averages, the `nnx.BatchStat`s `mean` and `var`, otherwise. Statistics and result are in
    at least float32. Inside `nnx.pmap` or `jax.shard_map`, `axis_name` synchronizes the statistics.

    Attributes:
      num_features: C, the number of classes.
      use_running_average: as in `nnx.BatchNorm`, so that a module's `train()` and `eval()` and `nnx.view` set it; None
        leaves it to the call.
      axis_name, epsilon, momentum, running_variance, scale: as in `mimicnorm_jax.linen.LastBatchNorm`.
      mean, var: the running averages, `(C,)`.

    Example:
      >>> norm = LastBatchNorm(3)
      >>> norm(jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])).round(3).tolist()
      [[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]]
      >>> norm.mean[...].round(3).tolist()
      [0.20000000298023224, 0.20000000298023224, 0.20000000298023224]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis_name: str | None = None,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        running_variance: RunningVariance = "biased",
        scale: float = 1.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Args beside the attributes.

        Args:
          num_features, use_running_average, axis_name, epsilon, momentum, running_variance, scale: see the class.
          param_dtype: of the running averages; at least float32.
          rngs: nothing is drawn; here so that the class can stand where `nnx.BatchNorm` does.

        Raises:
          ValueError: for an unknown `running_variance`, and for a `scale` that is not positive.
        """
        del rngs
        check_running_variance(running_variance)
        check_scale(scale)
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), dtype))
        self.var = nnx.BatchStat(jnp.ones((num_features,), dtype))
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis_name = axis_name
        self.epsilon = epsilon
        self.momentum = momentum
        self.running_variance: RunningVariance = running_variance
        self.scale = scale

    def __call__(self, logits: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalizes logits, and in training moves the running averages.

        Args:
          logits: `(B, C)`.
          use_running_average: in place of the attribute.

        Returns:
          `(B, C)`, in at least float32.

        Raises:
          ValueError: for logits that are not `(B, C)`, where neither the call nor the attribute says whether to use
            the running averages, and in training for a batch of one, which has no variance. A program exported for a
            symbolic batch gives NaN for a batch of one instead.
        """
        use_average = self.use_running_average if use_running_average is None else use_running_average
        if use_average is None:
            raise ValueError(
                "LastBatchNorm needs use_running_average, True in evaluation and False in training: where it is made, "
                "in its call, or by train() and eval() of the model"
            )
        z = wide_logits(logits)
        if z.shape[1] != self.num_features:
            raise ValueError(f"LastBatchNorm({self.num_features}) normalizes as many logits; got shape {logits.shape}")
        mean, var = self.mean[...], self.var[...]
        if use_average:
            return normalize(z, mean, var, self.epsilon, self.scale)
        batch = batch_statistics(z, self.axis_name)
        moved = running_averages(mean, var, batch, self.momentum, self.running_variance)
        # No gradient: a variable may be a reference to memory, which a tangent cannot be written to.
        self.mean[...], self.var[...] = (lax.stop_gradient(new).astype(mean.dtype) for new in moved)
        return normalize(z, batch.mean, batch.var, self.epsilon, self.scale)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          use_running_average: see the class; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
