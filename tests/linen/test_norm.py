"""The last BatchNorm against its definition, against Flax's, and across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import LastBatchNorm


def _normalize(logits, stats=None, train=True, **options):
    layer = LastBatchNorm(**options)
    variables = stats or layer.init(jax.random.key(0), logits, use_running_average=False)
    return layer.apply(variables, logits, use_running_average=not train, mutable=["batch_stats"])


def test_last_batch_norm_against_its_definition(x64):
    z = 3 * jax.random.normal(jax.random.key(0), (16, 5), float) + 7
    y, stats = _normalize(z)
    z = np.asarray(z)
    mean, var = z.sum(0) / 16, ((z - z.sum(0) / 16) ** 2).sum(0) / 16
    np.testing.assert_allclose(y, (z - mean) / np.sqrt(var + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(stats["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-12)
    _, unbiased = _normalize(z, running_variance="unbiased")
    np.testing.assert_allclose(unbiased["batch_stats"]["var"], 0.9 + 0.1 * np.var(z, 0, ddof=1), rtol=1e-12)


def test_a_scale_multiplies_what_is_normalized_and_leaves_the_averages():
    z = jax.random.normal(jax.random.key(0), (16, 5))
    for train in (True, False):
        (plain, averages), (scaled, same) = (_normalize(z, train=train, scale=scale) for scale in (1.0, 4.0))
        np.testing.assert_array_equal(scaled, 4 * plain)  # by a power of two, which rounds nothing
        jax.tree.map(np.testing.assert_array_equal, same, averages)


def test_last_batch_norm_agrees_with_flax():
    z = jax.random.normal(jax.random.key(0), (16, 5))
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, use_scale=False, use_bias=False)
    expected, stats = flax.apply(flax.init(jax.random.key(0), z), z, mutable=["batch_stats"])
    y, ours = _normalize(z)
    # float32: a few units in the last place of numbers of order 1.
    np.testing.assert_allclose(y, expected, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, stats)


def test_last_batch_norm_in_evaluation_uses_the_averages_and_leaves_them():
    z = jax.random.normal(jax.random.key(0), (1, 3))
    stats = {"batch_stats": {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 1.0, 0.25])}}
    y, after = _normalize(z, stats, train=False)
    expected = (np.asarray(z) - [[1, 2, 3]]) / np.sqrt(np.array([[4, 1, 0.25]]) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, stats)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_synchronized_over_devices_equals_one_device(offset):
    z = jax.random.normal(jax.random.key(0), (4, 8, 5)) + offset
    weights = jax.random.normal(jax.random.key(1), z.shape)
    layer = LastBatchNorm(use_running_average=False, axis_name="d", running_variance="unbiased")
    variables = layer.init(jax.random.key(0), z[0])

    def apply(z, weights):
        y, pull_back, stats = jax.vjp(lambda z: layer.apply(variables, z, mutable=["batch_stats"]), z, has_aux=True)
        return y, pull_back(weights)[0], stats

    y, gradient, stats = jax.pmap(apply, axis_name="d")(z, weights)
    whole = LastBatchNorm(use_running_average=False, running_variance="unbiased")
    expected, pull_back, averages = jax.vjp(
        lambda z: whole.apply(variables, z, mutable=["batch_stats"]), z.reshape(32, 5), has_aux=True
    )
    # Both round the mean, by a few of float32's 6e-8; a difference of moments would lose the square of the offset.
    tolerance = 1e-5 + 3e-7 * offset
    np.testing.assert_allclose(y.reshape(32, 5), expected, atol=tolerance, rtol=tolerance)
    (expected,) = pull_back(weights.reshape(32, 5))
    np.testing.assert_allclose(gradient.reshape(32, 5), expected, atol=tolerance, rtol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=tolerance), stats, averages)


def test_synchronization_is_of_two_numbers_a_class():
    layer = LastBatchNorm(use_running_average=False, axis_name="d")
    variables = layer.init(jax.random.key(0), jnp.ones((2, 5)))
    text = str(
        jax.make_jaxpr(lambda z: layer.apply(variables, z, mutable=["batch_stats"]), axis_env=[("d", 4)])(
            jnp.ones((8, 5))
        )
    )
    collectives = [line.strip().split(":")[1].split()[0] for line in text.splitlines() if " psum" in line]
    assert collectives == ["f32[5]", "f32[5]"]


def test_bfloat16_logits_are_normalized_in_float32():
    z = jax.random.normal(jax.random.key(0), (64, 5)).astype(jnp.bfloat16)
    y, _ = _normalize(z)
    expected, _ = _normalize(z.astype(jnp.float32))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


def test_last_batch_norm_refuses_what_it_cannot_normalize():
    with pytest.raises(ValueError, match="training batch of 1"):
        _normalize(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        _normalize(jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="'exact'"):
        _normalize(jnp.ones((2, 3)), running_variance="exact")
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"positive number; got {scale}"):
            _normalize(jnp.ones((2, 3)), scale=scale)
