"""Every implementation and output against the kernel written out, and what must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK, empirical_ntk
from mimicnorm_jax.diagnostics.ntk import initial_variance, ntk_vector_product
from mimicnorm_jax.diagnostics.ntk.blocks import BlockedKernel
from mimicnorm_jax.diagnostics.ntk.implementation import Request
from mimicnorm_jax.diagnostics.ntk.structured_derivatives import StructuredDerivatives
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from tests.diagnostics.ntk.written_out import close, written_out

pytestmark = pytest.mark.usefixtures("x64")


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
    expected = written_out(_dense, params, x1, x2)
    close(empirical_ntk(_dense, params, x1, x2, implementation=implementation), expected)
    diagonal = np.einsum("nmoo->nmo", expected)
    close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output="diagonal"), diagonal)
    close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output="trace"), diagonal.sum(-1))
    close(empirical_ntk(_dense, params, x1, x2, implementation=implementation, output=2), diagonal[..., 2])
    close(empirical_ntk(_dense, params, x1, implementation=implementation), written_out(_dense, params, x1))


@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction"])
def test_weights_filter_and_scale_parameters(dense, implementation):
    params, x1, _ = dense
    for weights in ({"bias": 1.0}, {"centered": 2.0, "scale": 0.5}, {"last": 3.0, "bias2": 1.0}, {"scale": 1.0}):

        def weigh(path, leaf, weights=weights):
            return weights.get(path[-1], 0.0)

        close(
            empirical_ntk(_dense, params, x1, weights=weigh, implementation=implementation),
            written_out(_dense, params, x1, weights=weigh),
        )


def test_initial_variance_weights_kernels_by_their_mean_square(dense):
    params, x1, _ = dense
    weigh = initial_variance(params)
    assert weigh(("bias",), None) == weigh(("scale",), None) == 0
    np.testing.assert_allclose(weigh(("left",), None), np.mean(np.square(params["left"])))
    kernel = empirical_ntk(_dense, params, x1, weights=weigh)
    close(kernel, written_out(_dense, params, x1, weights=weigh))


def test_contributions_of_parameters_add_up(dense):
    params, x1, x2 = dense
    parts = EmpiricalNTK(_dense, per_parameter=True, implementation="structured_derivatives")(params, x1, x2)
    assert set(parts) == set(params)
    for name, part in parts.items():
        close(part, written_out(_dense, params, x1, x2, weights=lambda path, leaf, name=name: float(path[-1] == name)))


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
    close(blocked(params, x1, x2), whole(params, x1, x2))
    file = tmp_path / "kernel.npy"
    blocked(params, x1, x2, out=file)
    close(np.load(file), whole(params, x1, x2))
    assert {path.name for path in tmp_path.iterdir()} == {"kernel.npy", "kernel.npy.job"}


def test_ntk_vector_products(dense):
    params, x1, x2 = dense
    v = jnp.asarray(np.random.default_rng(3).standard_normal((4, 3)))
    expected = np.einsum("nmop,mp->no", written_out(_dense, params, x1, x2), v)
    close(ntk_vector_product(_dense, params, x1, x2)(v), expected)
    weigh = initial_variance(params)
    expected = np.einsum("nmop,mp->no", written_out(_dense, params, x1, x2, weights=weigh), v)
    close(ntk_vector_product(_dense, params, x1, x2, weigh)(v), expected)


def test_a_scalar_at_zero_still_counts(dense):
    """SkipInit's start: the kernel's own contribution vanishes, the scalar's does not."""
    params, x1, _ = dense
    params = {**params, "scale": jnp.zeros(())}
    close(empirical_ntk(_dense, params, x1, implementation="structured_derivatives"), written_out(_dense, params, x1))


def test_float32_agrees_to_its_precision(dense):
    params, x1, x2 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense)
    kernel = empirical_ntk(_dense, params, x1, x2, implementation="structured_derivatives")
    assert kernel.dtype == jnp.float32
    close(kernel, written_out(_dense, *dense), rtol=1e-5)


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
    close(again, written_out(_dense, jax.tree.map(lambda leaf: 2 * leaf, params), x1))


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
    with pytest.raises(ValueError, match=r"examples .* 5 .*is not finite|with [45] to 5 is not finite"):
        kernel(params, x1, out=tmp_path / "kernel.npy")
    with pytest.raises(ValueError, match=r"examples 0 to 5 .* not finite"):
        empirical_ntk(_dense, params, x1)
    assert list(tmp_path.iterdir()) == []
