"""Blocks of networks against the published structure written out, where shapes and counts would not tell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.models import seresnet, shufflenet


def _random_like(shapes, seed=0):
    """Parameters and statistics far from any initialization that keep activations of order 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim < 2:
            return jnp.asarray(rng.uniform(0.2, 0.6, leaf.shape))
        return jnp.asarray(rng.normal(size=leaf.shape) * math.sqrt(2 / math.prod(leaf.shape[:-1])))

    return jax.tree.map(draw, shapes)


def _create(name, method, width):
    return models.create(name, method=method, num_classes=5, width=width, dtype=float, param_dtype=float)


def _conv(x, kernel, *, padding=0, centered=False):
    if centered and math.prod(kernel.shape[:-1]) > 50:
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=numbers)


@jax.numpy_rank_promotion("allow")
def _densenet(variables, x, blocks, *, in_place, centered):
    """As published: everything concatenated, rectified in place or as a copy; the transition pools at its end."""
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, *path):
        p, s = params, stats
        for name in (*path, "bn"):
            if name not in p:
                return x
            p, s = p[name], s.get(name, {})
        return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def conv(x, layer, padding=0):
        return _conv(x, layer["conv"]["kernel"], padding=padding, centered=centered)

    x = conv(x, params["stem"], 1)
    for block, layers in enumerate(blocks, 1):
        for layer in range(1, layers + 1):
            name = f"block{block}_layer{layer}"
            y = jax.nn.relu(norm(x, name, "norm"))
            if in_place:
                x = y
            y = jax.nn.relu(norm(conv(y, params[name]["conv1"]), name, "conv1"))
            x = jnp.concatenate([x, conv(y, params[name]["conv2"], 1)], axis=-1)
        if block < len(blocks):
            x = conv(norm(x, f"transition{block}", "norm"), params[f"transition{block}"]["conv"])
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    x = jax.nn.relu(norm(x, "norm")).mean((1, 2))
    logits = x @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    if "last_bn" in stats:
        logits = (logits - stats["last_bn"]["mean"]) / jnp.sqrt(stats["last_bn"]["var"] + 1e-5)
    return logits


@pytest.mark.parametrize("method", ["mimicnorm", "none", "batchnorm"])
def test_densenet_concatenates_rectified_maps_exactly_where_no_norm_stands_before_the_relu(method, x64):
    """Logits and gradients; the other of the two readings gives other logits."""
    blocks = (2, 3)
    model = _create("densenet121", method, 0.25).clone(blocks=blocks)
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3), float)
    variables = {"batch_stats": {}, **_random_like(jax.eval_shape(model.init, jax.random.key(0), images))}

    def loss(params, function):
        logits = function({**variables, "params": params}, images)
        return (logits * jnp.arange(10.0).reshape(2, 5)).sum(), logits

    def written_out(variables, images):
        return _densenet(variables, images, blocks, in_place=method != "batchnorm", centered=method == "mimicnorm")

    @jax.jit
    def evaluate(params):
        both = [jax.grad(loss, has_aux=True)(params, function) for function in (model.apply, written_out)]
        other = _densenet(variables, images, blocks, in_place=method == "batchnorm", centered=method == "mimicnorm")
        return *both, other

    found, expected, other = evaluate(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found, expected)
    assert abs(found[1] - other).max() > 1e-3


@pytest.mark.parametrize(("block", "last"), [(seresnet.BasicBlock, "conv2"), (seresnet.Bottleneck, "conv3")])
@pytest.mark.parametrize("strides", [1, 2])
def test_excitation_gates_the_rectified_branch_before_the_sum(block, last, strides, x64):
    """relu(s relu(branch) + shortcut); s the excitation written out, and sigmoid(b2) where its weights are 0."""
    factory = _create("seresnet18", "mimicnorm", 1.0).factory
    module = block(factory, 16, strides, block=2, blocks=8, sums=1)
    expansion = 4 if block is seresnet.Bottleneck else 1
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 16 * expansion), float)
    params = _random_like(jax.eval_shape(module.init, jax.random.key(0), x, False))["params"]
    assert params["excitation"]["dense1"]["kernel"].shape == (16 * expansion, expansion)

    @jax.jit
    def outputs(params):
        wanted = (last, "shortcut")
        y, state = module.apply({"params": params}, x, False, capture_intermediates=lambda m, _: m.name in wanted)
        return y, {name: out["__call__"][0] for name, out in state["intermediates"].items()}

    for zero in (False, True):
        dense1, dense2 = (jax.tree.map(np.asarray, params["excitation"][name]) for name in ("dense1", "dense2"))
        if zero:
            dense2 = {**dense2, "kernel": np.zeros_like(dense2["kernel"])}
        y, inside = jax.device_get(outputs({**params, "excitation": {"dense1": dense1, "dense2": dense2}}))
        u = np.maximum(inside[last], 0)
        hidden = np.maximum(u.mean((1, 2)) @ dense1["kernel"] + dense1["bias"], 0)
        scale = 1 / (1 + np.exp(-(hidden @ dense2["kernel"] + dense2["bias"])))
        if zero:
            np.testing.assert_allclose(scale, np.broadcast_to(1 / (1 + np.exp(-dense2["bias"])), scale.shape))
        shortcut = inside["shortcut"] if strides == 2 else x
        np.testing.assert_allclose(
            y, np.maximum(u * scale[:, None, None] + np.asarray(shortcut), 0), rtol=1e-10, atol=1e-12
        )


def test_imagenet_shufflenet_rectifies_and_pools_its_stem_and_widens_at_once(x64):
    model = _create("shufflenetv2_x1_imagenet", "mimicnorm", 1.0)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3), float)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = {**variables, "params": _random_like(variables["params"])}
    unit = shufflenet.Unit(model.factory, 116, 2, imagenet=True)

    def stem_and_first_unit(variables):
        bound = {"capture_intermediates": lambda m, _: m.name in ("stem", "stage1_unit1")}
        stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables["batch_stats"])
        state = model.apply({"params": variables["params"], "batch_stats": stats}, images, **bound)[1]["intermediates"]
        return state["stem"]["__call__"][0], state["stage1_unit1"]["__call__"][0]

    stem, found = jax.jit(lambda params: stem_and_first_unit({**variables, "params": params}))(variables["params"])
    padded = np.pad(np.maximum(stem, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    pooled = np.max([padded[:, i : i + 16 : 2, j : j + 16 : 2] for i in range(3) for j in range(3)], axis=0)
    assert pooled.shape == (1, 8, 8, 24)
    assert variables["params"]["stage1_unit1"]["conv1"]["conv"]["kernel"].shape == (1, 1, 24, 58)
    expected = unit.apply({"params": variables["params"]["stage1_unit1"]}, jnp.asarray(pooled), False)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert found.min() >= 0
