"""Structured derivatives against the explicit product of Jacobians, and what must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, CenteredDense, KernelTransform, LastBatchNorm, center, models
from mimicnorm_jax.diagnostics import (
    IMPLEMENTATIONS,
    EmpiricalNTK,
    empirical_ntk,
    from_linen,
    initial_variance,
    ntk_vector_product,
)
from mimicnorm_jax.diagnostics.ntk.blocks import BlockedKernel
from mimicnorm_jax.diagnostics.ntk.implementation import Request
from mimicnorm_jax.diagnostics.ntk.structured_derivatives import StructuredDerivatives
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from tests.conftest import also

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


def _reference(apply_fn, params, x1, x2=None, weights=lambda path, leaf: 1.0):
    """Written out: no line of the library in it."""
    total = 0
    jacobian = jax.jit(jax.jacrev(apply_fn))
    first = jacobian(params, x1)
    second = first if x2 is None else jacobian(params, x2)
    for path, j1 in jax.tree_util.tree_leaves_with_path(first):
        j2 = _leaf(second, path)
        weight = weights(tuple(entry.key for entry in path), None)
        rows = [np.asarray(j).reshape(*j.shape[:2], -1) for j in (j1, j2)]
        total = total + weight * np.einsum("nok,mpk->nmop", *rows)
    return total


def _leaf(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def _close(measured, expected, rtol=1e-10):
    np.testing.assert_allclose(measured, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "method", "width", "side"),
    [
        ("resnet18", "mimicnorm", 0.1875, 8),
        ("resnet8", "batchnorm", 0.5, 4),
        ("shufflenetv2_x1", "mimicnorm", 0.25, 8),
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
    _close(kernel(params, x), EmpiricalNTK(apply_fn, implementation="jacobian_contraction")(params, x))


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
        return (
            jax.jit(nn.Dense(3, param_dtype=jnp.float64).__call__)(x.mean(1))
            if False
            else nn.Dense(3, param_dtype=jnp.float64)(x.mean(1))
        )


def test_a_model_from_outside():
    module, x = Outside(), _images(3, 6)
    apply_fn, params = from_linen(module, _params(module, x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    _close(kernel(params, x), _reference(apply_fn, params, x))
    detail = kernel.plan(params, x).detail
    assert "0 through" not in detail  # the shared and the normalized kernel are


def _dense(params, x):
    """A MLP written by hand, with a kernel on the left, a kernel centered by hand and a scaled one."""
    x = jnp.tanh(x @ params["first"] + params["bias"][None])
    x = jnp.tanh((params["left"] @ x.T).T)
    kernel = params["centered"] - params["centered"].mean(0, keepdims=True)
    x = jnp.tanh(x @ (params["scale"] * kernel) + params["scale"] * params["bias2"][None])
    return x @ params["last"].T


@pytest.fixture
def dense():
    rng = np.random.default_rng(0)
    shapes = {
        "first": (5, 7),
        "bias": (7,),
        "left": (6, 7),
        "centered": (6, 4),
        "scale": (),
        "bias2": (4,),
        "last": (3, 4),
    }
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.standard_normal((6, 5))), jnp.asarray(rng.standard_normal((4, 5)))


@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction", "ntk_vector_products"])
def test_every_implementation_and_output_against_the_reference(dense, implementation):
    params, x1, x2 = dense
    expected = _reference(_dense, params, x1, x2)
    _close(empirical_ntk(_dense, params, x1, x2, implementation=implementation), expected)
    diagonal = np.einsum("nmoo->nmo", expected)
    _close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output="diagonal"), diagonal)
    _close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output="trace"), diagonal.sum(-1))
    _close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output=2), diagonal[..., 2])
    _close(empirical_ntk(_dense, params, x1, implementation=implementation), _reference(_dense, params, x1))


@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction"])
def test_weights_filter_and_scale_parameters(dense, implementation):
    params, x1, _ = dense
    for weights in ({"bias": 1.0}, {"centered": 2.0, "scale": 0.5}, {"last": 3.0, "bias2": 1.0}, {"scale": 1.0}):

        def weigh(path, leaf, weights=weights):
            return weights.get(path[-1], 0.0)

        _close(
            empirical_ntk(_dense, params, x1, weights=weigh, implementation=implementation),
            _reference(_dense, params, x1, weights=weigh),
        )


def test_initial_variance_weights_kernels_by_their_mean_square(dense):
    params, x1, _ = dense
    weigh = initial_variance(params)
    assert weigh(("bias",), None) == weigh(("scale",), None) == 0
    np.testing.assert_allclose(weigh(("left",), None), np.mean(np.square(params["left"])))
    kernel = empirical_ntk(_dense, params, x1, weights=weigh)
    _close(kernel, _reference(_dense, params, x1, weights=weigh))


def test_contributions_of_parameters_add_up(dense):
    params, x1, x2 = dense
    parts = EmpiricalNTK(_dense, per_parameter=True, implementation="structured_derivatives")(params, x1, x2)
    assert set(parts) == set(params)
    for name, part in parts.items():
        _close(part, _reference(_dense, params, x1, x2, weights=lambda path, leaf, name=name: float(path[-1] == name)))


@pytest.mark.parametrize(
    ("output", "implementation", "second"),
    [
        *((output, "structured_derivatives", False) for output in ("full", "diagonal", "trace")),
        ("full", "structured_derivatives", True),
        ("trace", "ntk_vector_products", True),
    ],
)
def test_blocks_on_several_devices_and_on_disk_give_the_whole_kernel(dense, tmp_path, output, second, implementation):
    """Seven and four examples in blocks of at most three, the last ones short, on four devices."""
    params, x1, x2 = dense
    x1, x2 = jnp.concatenate([x1, x1[:1] + 1]), x2 if second else None
    whole = EmpiricalNTK(_dense, output=output, implementation=implementation)
    enough = whole.plan(params, x1[:3], x1[3:6]).bytes
    blocked = EmpiricalNTK(_dense, output=output, implementation=implementation, memory=enough)
    assert blocked.plan(params, x1, x2).block[0] < 4
    _close(blocked(params, x1, x2), whole(params, x1, x2))
    file = tmp_path / "kernel.npy"
    blocked(params, x1, x2, out=file)
    _close(np.load(file), whole(params, x1, x2))
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.npy"]


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
    expected = _reference(apply_fn, params, x)
    outputs = {"full": expected, 1: expected[:, :, 1, 1], "trace": np.einsum("nmoo->nm", expected)}
    for implementation in IMPLEMENTATIONS:
        for output in outputs if implementation == "structured_derivatives" else ("full",):
            options = {"implementation": implementation, "output": output}
            _close(empirical_ntk(apply_fn, params, x, batch_coupled=True, **options), outputs[output])
    # The batch's normalized outputs keep mean 0 and variance 1, whatever the parameters: 1 and z are null vectors.
    kernel, z = np.asarray(empirical_ntk(apply_fn, params, x, batch_coupled=True)), np.asarray(apply_fn(params, x))
    largest = np.linalg.eigvalsh(kernel.transpose(0, 2, 1, 3).reshape(10, 10))[-1]
    assert np.abs(kernel.sum(0)).max() < 1e-10 * largest
    assert np.abs(np.einsum("no,nmop->mop", z, kernel)).max() < 1e-10 * largest
    with pytest.raises(ValueError, match=r"batch_coupled=True"):
        empirical_ntk(apply_fn, params, x)


def test_ntk_vector_products(dense):
    params, x1, x2 = dense
    v = jnp.asarray(np.random.default_rng(3).standard_normal((4, 3)))
    expected = np.einsum("nmop,mp->no", _reference(_dense, params, x1, x2), v)
    _close(ntk_vector_product(_dense, params, x1, x2)(v), expected)
    weigh = initial_variance(params)
    expected = np.einsum("nmop,mp->no", _reference(_dense, params, x1, x2, weights=weigh), v)
    _close(ntk_vector_product(_dense, params, x1, x2, weigh)(v), expected)


def test_a_scalar_at_zero_still_counts(dense):
    """SkipInit's start: the kernel's own contribution vanishes, the scalar's does not."""
    params, x1, _ = dense
    params = {**params, "scale": jnp.zeros(())}
    _close(empirical_ntk(_dense, params, x1, implementation="structured_derivatives"), _reference(_dense, params, x1))


def test_float32_agrees_to_its_precision(dense):
    params, x1, x2 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense)
    kernel = empirical_ntk(_dense, params, x1, x2, implementation="structured_derivatives")
    assert kernel.dtype == jnp.float32
    _close(kernel, _reference(_dense, *dense), rtol=1e-5)


def test_products_are_in_full_precision(dense):
    """On accelerators whose default is coarser than float32, small eigenvalues would be lost."""
    params, x1, _ = dense
    leaves = jax.tree.leaves(params)
    request = Request(TracedNetwork(_dense, params, x1[:1]), leaves, x1[:1], [1.0] * len(leaves), "full", None, False)
    kernel = BlockedKernel(StructuredDerivatives(request, (len(x1), None)), (len(x1), len(x1)))
    text = kernel.whole.lower(params, x1, None).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_a_second_call_compiles_nothing(dense):
    params, x1, _ = dense
    traces = []

    def counted(params, x):
        traces.append(0)
        return _dense(params, x)

    kernel = EmpiricalNTK(counted)
    kernel(params, x1)
    before = len(traces)
    again = kernel(jax.tree.map(lambda leaf: 2 * leaf, params), x1)
    assert len(traces) == before
    _close(again, _reference(_dense, jax.tree.map(lambda leaf: 2 * leaf, params), x1))


def test_the_cost_model_prefers_what_is_cheaper_and_what_fits(dense):
    params, x1, _ = dense
    assert EmpiricalNTK(_dense).plan(params, x1).implementation == "structured_derivatives"
    wide = {"kernel": jnp.ones((4096, 2))}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4096)))
    linear = EmpiricalNTK(lambda params, x: x @ params["kernel"], memory=3 * 2**18)
    assert (
        linear.plan(wide, x).implementation != "jacobian_contraction"
    )  # its rows alone take 2 x 8192 numbers of 8 bytes, twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "ful"}, "did you mean full"),
        ({"output": 3}, "the network has 3 outputs"),
        ({"implementation": "structured"}, "did you mean structured_derivatives"),
        ({"weights": lambda path, leaf: -1.0}, "weights give -1.0 for bias"),
        ({"weights": lambda path, leaf: 0.0}, "leave out every parameter"),
        ({"memory": 1000}, "memory is 1,000 bytes.*raise memory"),
        ({"x1": jnp.ones((0, 5))}, r"shape \(0, 5\)"),
        ({"x1": jnp.full((6, 5), jnp.nan)}, "outputs of example 0 are not finite"),
        ({"x2": jnp.ones((4, 6))}, "inputs of the same network"),
        ({"apply_fn": lambda params, x: x[:, 0]}, r"shape \(6,\).*\(N, O\)"),
        ({"apply_fn": lambda params, x: (x, {})}, "not one array"),
        ({"apply_fn": lambda params, x: (x > 0).astype(int)}, "int"),
    ],
)
def test_bad_input_is_named(dense, change, message):
    params, x1, _ = dense
    x1, x2 = change.pop("x1", x1), change.pop("x2", None)
    with pytest.raises(ValueError, match=message):
        EmpiricalNTK(change.pop("apply_fn", _dense), **change)(params, x1, x2)


def test_a_kernel_that_is_not_finite_leaves_no_file(dense, tmp_path):
    params, x1, _ = dense
    x1 = x1.at[5].set(jnp.nan)  # beyond the examples that are tried first
    enough = EmpiricalNTK(_dense, implementation="structured_derivatives").plan(params, x1[:2], x1[2:4]).bytes
    kernel = EmpiricalNTK(_dense, memory=enough)
    with pytest.raises(ValueError, match=r"examples 4 to 5 .* is not finite|examples 0 to 1 with 4 to 5 is not finite"):
        kernel(params, x1, out=tmp_path / "kernel.npy")
    with pytest.raises(ValueError, match=r"examples 0 to 5 .* not finite"):
        empirical_ntk(_dense, params, x1)
    assert list(tmp_path.iterdir()) == []
