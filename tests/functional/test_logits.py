"""The floor under the cross entropy of normalized logits, held to what an optimizer finds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from mimicnorm_jax.functional import cross_entropy_floor
from mimicnorm_jax.linen import LastBatchNorm

pytestmark = pytest.mark.usefixtures("x64")


def _least(labels, classes, scale):
    """By projected gradient descent over logits of mean 0 and variance at most 1: a convex problem, so one minimum."""

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(scale * logits, labels).mean()

    def projected(_, logits):
        logits -= 2 * len(labels) / scale**2 * jax.grad(loss)(logits)  # one over the Lipschitz constant of the gradient
        logits -= logits.mean(0, keepdims=True)
        return logits / jnp.maximum(logits.std(0, keepdims=True), 1)

    start = jnp.asarray(np.random.default_rng(0).normal(size=(len(labels), classes)))
    return loss(lax.fori_loop(0, 20_000, projected, start))


@pytest.mark.parametrize(("classes", "each", "scale"), [(2, 3, 1.0), (3, 2, 2.5), (5, 3, 1.0), (10, 2, 1.0)])
def test_no_logits_are_below_the_floor_and_those_of_the_labels_are_at_it(classes, each, scale):
    labels = jnp.repeat(jnp.arange(classes), each)
    least = _least(labels, classes, scale)
    floor = cross_entropy_floor(classes, scale)
    # In float64; the descent's last steps change nothing.
    np.testing.assert_allclose(least, floor, rtol=1e-9)
    norm = LastBatchNorm(use_running_average=False, epsilon=0.0, scale=scale)
    logits, _ = norm.init_with_output(jax.random.key(0), jax.nn.one_hot(labels, classes))
    best = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(best, floor, rtol=1e-12)


@pytest.mark.parametrize("counts", [(1, 3), (2, 2, 1), (5, 1, 0), (4, 3, 2, 2, 1)])
def test_batches_of_uneven_classes_are_above_the_floor(counts):
    labels = jnp.repeat(jnp.arange(len(counts)), jnp.array(counts), total_repeat_length=sum(counts))
    assert _least(labels, len(counts), 1.0) > cross_entropy_floor(len(counts)) * 1.001


@pytest.mark.parametrize("arguments", [(1,), (10, 0.0), (10, float("inf"))])
def test_what_has_no_floor_is_refused(arguments):
    with pytest.raises(ValueError, match=r"num_classes=1|positive number"):
        cross_entropy_floor(*arguments)
