"""What a network can reach whose logits are normalized: a floor under the cross entropy that depends on their scale."""

import math

from mimicnorm_jax.functional.logits import check_scale


def cross_entropy_floor(num_classes: int, scale: float = 1.0) -> float:
    r"""The least mean cross entropy that normalized logits have on a batch with as many examples of every class.

    $\log(1 + (C - 1) \exp(-s C / \sqrt{C - 1}))$ for C classes and logits times s (beyond Fei et al., where s = 1). No
    network goes below it in training; the labels' probability is at most $e^{-\text{floor}}$ in the geometric mean.

    Proof: cross entropy is convex in the logits, and so is the set of logits of mean 0 and variance at most 1 in every
    class. Permuting classes together with the examples that they label changes neither, nor does permuting the examples
    of a class. So the mean of the best logits over all such permutations is as good as they are: a for the label and b
    for every other class, where $a + (C - 1) b = 0$ and $(a^2 + (C - 1) b^2) / C \le 1$. The loss falls with
    $a - b$, at most $C / \sqrt{C - 1}$. The last BatchNorm's epsilon makes the variance a bit smaller than 1.

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
