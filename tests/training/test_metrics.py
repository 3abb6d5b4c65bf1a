"""Metrics add up exactly over batches, masks and devices."""

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.training import Metrics


def test_masked_batches_add_up_to_the_mean_over_all_images():
    logits = np.asarray(jax.random.normal(jax.random.key(0), (10, 4)))
    labels = np.arange(10) % 4
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    total = Metrics.empty()
    for rows, mask in ((slice(0, 4), [1, 1, 1, 1]), (slice(4, 8), [1, 1, 1, 1]), ([8, 9, 9, 9], [1, 1, 0, 0])):
        total += Metrics.from_logits(jnp.asarray(logits[rows]), jnp.asarray(labels[rows]), jnp.array(mask, float))
    assert float(total.count) == 10
    np.testing.assert_allclose(total.loss, -np.log(probabilities[np.arange(10), labels]).mean(), rtol=1e-6)
    np.testing.assert_allclose(total.accuracy, (logits.argmax(1) == labels).mean(), rtol=1e-6)


def test_sum_over_devices():
    logits, labels = jax.random.normal(jax.random.key(0), (4, 3, 5)), jnp.zeros((4, 3), int)
    spread = jax.pmap(lambda z, y: Metrics.from_logits(z, y).psum("d"), axis_name="d", out_axes=None)(logits, labels)
    whole = Metrics.from_logits(logits.reshape(12, 5), labels.reshape(12))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), spread, whole)
