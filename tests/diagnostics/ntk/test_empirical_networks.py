"""Structured derivatives of whole networks against the explicit product of Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, CenteredDense, KernelTransform, LastBatchNorm, center, models
from mimicnorm_jax.diagnostics import EmpiricalNTK, empirical_ntk, from_linen
from mimicnorm_jax.diagnostics.ntk import IMPLEMENTATIONS
from tests.conftest import also
from tests.diagnostics.ntk.written_out import close, written_out

pytestmark = pytest.mark.usefixtures("x64")

DOUBLE = {"dtype": "float64", "param_dtype": "float64"}


def _params(module, x, seed=0, **kwargs):
    """Random values for every parameter and statistic, so that nothing is zero or one by accident."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda x: module.init({"params": jax.random.key(0)}, x, **kwargs), x)

    def value(path, leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        noise = rng.standard_normal(leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(1 + 0.2 * abs(noise) if leaf.ndim < 2 else noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def _images(count, side, channels=3, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, side, side, channels)))


@pytest.mark.parametrize(
    ("name", "method", "width", "side"),
    [
        ("resnet18", "mimicnorm", 0.1875, 8),
        ("resnet8", "batchnorm", 0.5, 4),
        also("shufflenetv2_x1", "mimicnorm", 0.25, 8),
        also("vgg11", "mimicnorm", 0.125, 32),
        also("squeezenet", "mimicnorm", 0.25, 8),
        also("mobilenetv2", "mimicnorm", 0.25, 8),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_structured_derivatives_equal_the_product_of_jacobians(name, method, width, side):
    """Centered and not, with biases and folded scalars, grouped and depthwise convolutions, running averages."""
    model = models.create(name, method=method, num_classes=3, width=width, **DOUBLE)
    x = _images(2, side)
    apply_fn, params = from_linen(model, _params(model, x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    assert ", 0 through their kernel's derivative" in kernel.plan(params, x).detail  # every layer is of known form
    close(kernel(params, x), EmpiricalNTK(apply_fn, implementation="jacobian_contraction")(params, x))


class Outside(nn.Module):
    """Not ours: norms, strides, dilation, groups, circular padding, shared, normalized and transposed layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2, param_dtype=jnp.float64)(x))
        x = nn.GroupNorm(2, param_dtype=jnp.float64)(x)
        x = nn.relu(
            nn.Conv(8, (3, 2), strides=(2, 1), feature_group_count=2, padding="VALID", param_dtype=jnp.float64)(x)
        )
        x = nn.relu(nn.Conv(8, (3, 3), padding="CIRCULAR", use_bias=False, param_dtype=jnp.float64)(x))
        shared = nn.Conv(8, (1, 1), name="shared", param_dtype=jnp.float64)
        x = nn.tanh(shared(nn.tanh(shared(x))))
        x = nn.relu(nn.ConvTranspose(4, (2, 2), strides=(2, 2), param_dtype=jnp.float64)(x))
        x = nn.remat(nn.Dense)(5, param_dtype=jnp.float64)(x)
        x = nn.LayerNorm(param_dtype=jnp.float64)(x.reshape(x.shape[0], -1, 5))
        x = nn.WeightNorm(nn.Dense(5, param_dtype=jnp.float64), param_dtype=jnp.float64)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=1, qkv_features=4, param_dtype=jnp.float64)(x, x)
        x = x + nn.Embed(3, 5, param_dtype=jnp.float64)(jnp.zeros(x.shape[:2], int))
        return nn.Dense(3, param_dtype=jnp.float64)(x.mean(1))


def test_a_model_from_outside():
    module, x = Outside(), _images(3, 6)
    apply_fn, params = from_linen(module, _params(module, x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    close(kernel(params, x), written_out(apply_fn, params, x))
    detail = kernel.plan(params, x).detail
    assert "0 through" not in detail  # the shared and the normalized kernel are


class Normalized(nn.Module):
    """BatchNorms within and on top, a convolution and centered dense layers."""

    @nn.compact
    def __call__(self, x, train):
        norm = {"use_running_average": not train, "param_dtype": jnp.float64}
        conv = CenteredConv(4, (3, 3), kernel_transform=KernelTransform(center), param_dtype=jnp.float64)
        x = nn.relu(nn.BatchNorm(**norm)(conv(x)))
        x = nn.relu(CenteredDense(6, param_dtype=jnp.float64)(x.mean((1, 2))))
        return LastBatchNorm(use_running_average=not train, epsilon=1e-30)(nn.Dense(2, param_dtype=jnp.float64)(x))


def test_coupled_batches_and_the_null_vectors_of_a_last_batch_norm():
    module, x = Normalized(), _images(5, 4)
    variables = _params(module, x, train=False)
    apply_fn, params = from_linen(module, variables, train=True, mutable=["batch_stats"])
    expected = written_out(apply_fn, params, x)
    outputs = {"full": expected, 1: expected[:, :, 1, 1], "trace": np.einsum("nmoo->nm", expected)}
    for implementation in IMPLEMENTATIONS:
        for output in outputs if implementation == "structured_derivatives" else ("full",):
            options = {"implementation": implementation, "output": output}
            close(empirical_ntk(apply_fn, params, x, batch_coupled=True, **options), outputs[output])
    # The batch's normalized outputs keep mean 0 and variance 1, whatever the parameters: 1 and z are null vectors.
    kernel, z = np.asarray(empirical_ntk(apply_fn, params, x, batch_coupled=True)), np.asarray(apply_fn(params, x))
    largest = np.linalg.eigvalsh(kernel.transpose(0, 2, 1, 3).reshape(10, 10))[-1]
    assert np.abs(kernel.sum(0)).max() < 1e-10 * largest
    assert np.abs(np.einsum("no,nmop->mop", z, kernel)).max() < 1e-10 * largest
    with pytest.raises(ValueError, match=r"batch_coupled=True"):
        empirical_ntk(apply_fn, params, x)
