"""Interception of calls: not lost in what `nn.jit` traced before, nor led astray by modules that have no scope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import interop, models
from mimicnorm_jax.functional import KernelTransform, center
from mimicnorm_jax.linen import Transformed, WithLastBatchNorm, find_kernels

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)


class Scaling(nn.Module):
    """Of arithmetic alone, so that it can be called where no parameters are."""

    def scaled(self, x):
        return 1.0 * x


SCALING = Scaling()  # outside of any network: it never has a scope
JitConvNorm = nn.jit(models.ConvNorm, static_argnums=2)  # one class, so that it keeps its traces from call to call


class Network(nn.Module):
    """A convolution with its norm and a classifier."""

    factory: models.LayerFactory
    scopeless: bool = False
    jitted: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        factory, conv_norm = self.factory, JitConvNorm if self.jitted else models.ConvNorm
        x = SCALING.scaled(x) if self.scopeless else x
        x = factory.relu(conv_norm(factory, 4, 3, name="conv1")(x, train)).mean((1, 2))
        return factory.logits(factory.classifier(5)(x), train)


def _networks(method):
    """One with nothing to go wrong, and the one that is to be told apart from it."""
    factory = models.create("resnet8", method=method).factory
    return Network(factory), Network(factory, scopeless=True, jitted=True)


@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm"])
def test_networks_fold_as_they_do_without_such_parts(method):
    plain, other = _networks(method)
    variables = plain.init(jax.random.key(0), IMAGES)
    other.apply(variables, IMAGES)  # traced by `nn.jit` with nothing around
    expected, found = (interop.fold(net, variables, image_shape=(8, 8, 3)) for net in (plain, other))
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    np.testing.assert_allclose(found[0].apply(found[1], IMAGES), plain.apply(variables, IMAGES), atol=1e-5)


def test_kernels_are_reported_and_transformed_as_without_such_parts():
    plain, other = _networks("none")
    variables = plain.init(jax.random.key(0), IMAGES)
    other.apply(variables, IMAGES)
    assert str(interop.layer_report(other, IMAGES)) == str(interop.layer_report(plain, IMAGES))
    assert find_kernels(other, IMAGES) == find_kernels(plain, IMAGES)
    for wrap in (lambda net: Transformed(net, KernelTransform(center)), WithLastBatchNorm):
        variables = wrap(plain).init(jax.random.key(1), IMAGES)
        found, expected = (wrap(net).apply(variables, IMAGES, train=False) for net in (other, plain))
        np.testing.assert_allclose(found, expected, atol=1e-6)  # float32: a program of its own under `nn.jit`


class Block(nn.Module):
    """One of several that are alike."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), use_bias=False)(x)))


class Twins(nn.Module):
    """Two blocks of one class, which `nn.jit` traces once."""

    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(self.block(name="b")(self.block(name="a")(x)).mean((1, 2)))


def _first_only(layer):
    return layer.path[0] == "a"


def test_of_two_parts_that_are_alike_each_is_seen_and_has_its_own_choice():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 6, 8)), jnp.float32)
    plain, jitted = Twins(Block), Twins(nn.jit(Block))
    variables = plain.init(jax.random.key(0), images)
    assert find_kernels(jitted, images) == find_kernels(plain, images)
    converted = [interop.mimic(net, select=_first_only, norm=None) for net in (plain, jitted)]
    assert len({str(interop.layer_report(net, images)) for net in converted}) == 1
    expected, found = (net.apply({"params": variables["params"]}, images) for net in converted)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32: a program of its own under `nn.jit`
