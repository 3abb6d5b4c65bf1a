"""Rematerialization changes what is kept for the backward pass, and nothing of the gradient."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.models.resnet import Bottleneck, ResNet
from tests.conftest import also
from tests.diagnostics.networks import filled


def _loss(name, method, remat, width, dtype, side=32):
    model = models.create(name, method=method, num_classes=5, width=width, remat=remat, dtype=dtype, param_dtype=dtype)
    images = jax.random.normal(jax.random.key(1), (3, side, side, 3), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, stats):
        rngs = {"dropout": jax.random.key(2)}
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"], rngs=rngs
        )
        return (logits**2 * jnp.arange(15.0, dtype=dtype).reshape(3, 5)).sum(), updated

    return model, images, variables, loss


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A ResNet of two stages of two bottlenecks."""
    build = partial(ResNet, block=Bottleneck, stages=(2, 2), channels=64)
    monkeypatch.setitem(models.ARCHITECTURES, "small", replace(models.ARCHITECTURES["resnet50"], build=build))


@pytest.mark.usefixtures("x64", "shallow")
@pytest.mark.parametrize(
    ("name", "method", "remat"),
    [
        also("resnet50", "mimicnorm", "cheap"),
        ("resnet50", "skipinit", "stage"),
        ("resnet50", "batchnorm", "cheap"),
        ("seresnet50", "mimicnorm", "cheap"),
        also("densenet121", "mimicnorm", "stage"),
        also("densenet121", "batchnorm", "cheap"),
        also("squeezenet", "mimicnorm", "cheap"),
        ("vgg11", "none", "stage"),
        also("shufflenetv2_x0.5", "mimicnorm", "cheap"),
        also("mobilenetv2", "mimicnorm", "cheap"),
    ],
)
def test_gradient_and_statistics_stay_the_same(name, method, remat):
    found, side = [], max(8, models.ARCHITECTURES[name].stride)
    for how in ("none", remat):
        model, images, shapes, loss = _loss(name, method, how, 0.125, jnp.float64, side)
        if not found:
            variables = filled(model, images)
        assert jax.tree.structure(variables) == jax.tree.structure(shapes)
        found.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"], variables.get("batch_stats", {})))
    # The same operations on the same numbers, in float64; sums may be taken in another order. Biases before a
    # transition between BatchNorms have gradient 0.
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * max(abs(np.asarray(b)).max(), 1e-3))
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(found[0][0])) > 1e-3


def _kept_maps(remat):
    _, _, variables, loss = _loss("small", "mimicnorm", remat, 0.25, jnp.float32)
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["batch_stats"])
    found = saved_for_backward(lambda params: loss(params, stats)[0], variables["params"])
    return [array.shape[1:] for array in found if array.ndim == 4 and array.shape[0] == 3]


def test_a_stage_keeps_what_enters_it():
    assert _kept_maps("stage") == [(32, 32, 16), (32, 32, 64)]


def test_cheap_keeps_no_wide_map_but_what_enters_a_stage():
    def wide(maps):
        return [shape for shape in maps if shape[-1] in (64, 128)]

    assert sorted(wide(_kept_maps("none"))) == [(16, 16, 128)] * 2 + [(32, 32, 64)] * 2
    assert wide(_kept_maps("cheap")) == [(32, 32, 64)]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="vgg11 keeps no output of one: choose 'none' or 'stage'"):
        models.create("vgg11", remat="cheap")
    with pytest.raises(ValueError, match="unknown remat 'chaep': did you mean cheap"):
        models.create("resnet50", remat="chaep")
