"""Normalization of logits: what the last BatchNorm computes, whoever holds its running averages."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RunningVariance = Literal["biased", "unbiased"]


class BatchStatistics(NamedTuple):
    """Of a batch of logits.

    Attributes:
      mean: `(C,)`.
      var: `(C,)`, biased.
      count: how many examples; a number, or symbolic under `jax.export`.
    """

    mean: jax.Array
    var: jax.Array
    count: Any


def check_running_variance(kind: str) -> None:
    """Raises ValueError for what `running_averages` does not know."""
    if kind not in ("biased", "unbiased"):
        raise ValueError(f"running_variance is 'biased' or 'unbiased'; got {kind!r}")


def check_scale(scale: float) -> None:
    """Raises ValueError for what `normalize` cannot multiply by."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale of normalized logits is a positive number; got {scale!r}")


def wide_logits(logits: jax.Array) -> jax.Array:
    """Logits `(B, C)` in at least float32; raises ValueError for what is no matrix."""
    if logits.ndim != 2:
        raise ValueError(f"LastBatchNorm normalizes logits of shape (B, C); got {logits.shape}")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def batch_statistics(z: jax.Array, axis_name: str | None = None, *, initializing: bool = False) -> BatchStatistics:
    """Mean and biased variance of logits over the batch.

    Args:
      z: `(B, C)`, of `wide_logits`.
      axis_name: mapped axis over which they are synchronized, by two pmeans of C numbers.
      initializing: whether only shapes are asked for: then nothing is synchronized, and a batch of one is none too few.

    Raises:
      ValueError: for a batch of one or none, which has no variance. A symbolic batch gives NaN for it instead.

    Example:
      >>> mean, var, count = batch_statistics(jnp.array([[1.0], [3.0]]))
      >>> mean.tolist(), var.tolist(), count
      ([2.0], [1.0], 2)
    """
    mean, count = z.mean(0), z.shape[0]
    if axis_name is None or initializing:
        var = z.var(0)
    else:
        # Around the common mean: a difference of moments, for which one pmean would do, cancels where means are large.
        mean = lax.pmean(mean, axis_name)
        var = lax.pmean(jnp.square(z - mean[None]).mean(0), axis_name)
        count *= lax.axis_size(axis_name)
    if not isinstance(count, int):  # symbolic, as `jax.export` may have it: known when the program runs
        var = jnp.where(jnp.asarray(count) < 2, jnp.nan, var)
    elif count < 2 and not initializing:
        raise ValueError(
            f"LastBatchNorm cannot normalize a training batch of {count}: use a larger batch, or the "
            "running averages (use_running_average=True)"
        )
    return BatchStatistics(mean, var, count)


def running_averages(
    mean: jax.Array, var: jax.Array, batch: BatchStatistics, momentum: float, kind: RunningVariance
) -> tuple[jax.Array, jax.Array]:
    """Running averages after a batch, in Flax's convention: `new = momentum old + (1 - momentum) batch`.

    Args:
      mean, var: the old ones, `(C,)`.
      batch: the batch's.
      momentum: such as 0.9.
      kind: which variance of the batch is averaged: `biased` or `unbiased` (times B / (B - 1)).

    Example:
      >>> batch = batch_statistics(jnp.array([[1.0], [3.0]]))
      >>> [x.tolist() for x in running_averages(jnp.zeros(1), jnp.ones(1), batch, 0.5, "unbiased")]
      [[1.0], [1.5]]
    """
    shown = batch.var * batch.count / (batch.count - 1) if kind == "unbiased" else batch.var
    return momentum * mean + (1 - momentum) * batch.mean, momentum * var + (1 - momentum) * shown


def normalize(z: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float, scale: float = 1.0) -> jax.Array:
    r"""$s (z - \mu) / \sqrt{\sigma^2 + \epsilon}$ of logits `(B, C)` (section 3.2, "last BN layer", has s = 1)."""
    return (z - mean[None]) * (lax.rsqrt(var + epsilon) * scale)[None]


def cross_entropy_floor(num_classes: int, scale: float = 1.0) -> float:
    r"""The least mean cross entropy that normalized logits can have on a batch.

    $\log(1 + (C - 1) \exp(-s C / \sqrt{C - 1}))$ for C classes and logits times s (beyond Fei et al., where s = 1),
    reached where every class has as many examples. No network goes below it in training; the labels' probability is at
    most $e^{-\text{floor}}$ in the geometric mean.

    Proof, first for such a batch: cross entropy is convex in the logits, and so is the set of logits of mean 0 and
    variance at most 1 in every class. Permuting classes together with the examples that they label changes neither, nor
    does permuting the examples of a class. So the mean of the best logits over all such permutations is as good as they
    are: a for the label and b for every other class, where $a + (C - 1) b = 0$ and $(a^2 + (C - 1) b^2) / C \le 1$.
    The loss falls with $a - b$, at most $C / \sqrt{C - 1}$. Any other batch, joined with its copies whose classes are
    shifted cyclically, logits and labels alike, is a batch of the first kind, of the same loss and within the same
    bounds. The last BatchNorm's epsilon makes the variance a bit smaller than 1.

    Args:
      num_classes: C.
      scale: s, as `LastBatchNorm.scale`.

    Raises:
      ValueError: for fewer than two classes, or a scale that is no positive number.

    Example:
      >>> [round(cross_entropy_floor(classes), 4) for classes in (2, 10, 100, 1000)]
      [0.1269, 0.2784, 0.0043, 0.0]
      >>> [round(cross_entropy_floor(10, scale), 4) for scale in (1.0, 2.0, 3.0)]
      [0.2784, 0.0114, 0.0004]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a cross entropy is of two classes or more")
    check_scale(scale)
    others = num_classes - 1
    return math.log1p(others * math.exp(-scale * num_classes / math.sqrt(others)))
