"""Small programs that the tests of planning compile, and where they can be compiled."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None
TPU = importlib.util.find_spec("libtpu") is not None
needs_cuda = pytest.mark.skipif(not CUDA, reason="no jax_cuda13_plugin: pip install 'mimicnorm_jax[plan]'")
needs_tpu = pytest.mark.skipif(not TPU, reason="no libtpu: pip install 'mimicnorm_jax[plan]'")
cpu_and_h100 = pytest.mark.parametrize("target", ["cpu", pytest.param("h100", marks=needs_cuda)])

H100_AND_V5E = (pytest.param("h100", marks=needs_cuda), pytest.param("v5e", marks=needs_tpu))
everywhere = pytest.mark.parametrize("target", ["cpu", *H100_AND_V5E])


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def conv(x, kernel, strides=1, padding=1, groups=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def net_step(state, images, labels):
    """SGD with momentum on three convolutions with ReLUs, the middle one with a residual."""

    def network(params):
        with jax.named_scope("stem"):
            x = jax.nn.relu(conv(images, params["stem"]))
        with jax.named_scope("middle"):
            x = jax.nn.relu(x + conv(x, params["middle"]))
        with jax.named_scope("last"):
            return jax.nn.relu(conv(x, params["last"], strides=2))

    def loss(params):
        with jax.named_scope("network"):  # as Flax does around a network's layers
            logits = network(params).mean((1, 2)) @ params["classifier"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    params, momentum = state
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, jax.grad(loss)(params))
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum


def net_shapes(batch=16):
    params = {
        "stem": shape(3, 3, 16, 32),
        "middle": shape(3, 3, 32, 32),
        "last": shape(3, 3, 32, 64),
        "classifier": shape(64, 10),
    }
    return (params, params), shape(batch, 32, 32, 16), shape(batch, dtype=jnp.int32)
