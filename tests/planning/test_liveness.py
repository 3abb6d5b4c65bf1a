"""What is alive at the peak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.planning import hlo, liveness, plan
from tests.planning.programs import conv, cpu_and_h100, everywhere, needs_cuda, net_shapes, net_step, shape

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", params=["cpu", "h100"])
def step_plan(request):
    from tests.planning.programs import CUDA

    if request.param == "h100" and not CUDA:
        pytest.skip("no jax_cuda13_plugin: pip install 'mimicnorm_jax[plan]'")
    return plan(net_step, *net_shapes(64), target=request.param, donate=(0,))


def test_what_is_alive_adds_up_to_the_peak(step_plan):
    """All but gaps between buffers, of which these few large ones leave hardly any; never more than the peak."""
    alive = sum(buffer.nbytes for buffer in step_plan.live)
    assert 0.98 * step_plan.peak_bytes <= alive <= step_plan.peak_bytes
    assert [b.nbytes for b in step_plan.live] == sorted((b.nbytes for b in step_plan.live), reverse=True)


def test_arguments_are_alive_under_their_names(step_plan):
    arguments = {b.layer: b.nbytes for b in step_plan.live if b.role == "argument"}
    assert sum(arguments.values()) == step_plan.argument_bytes
    assert arguments["state[0]['stem']"] == 4 * 3 * 3 * 16 * 32
    assert arguments["images"] == 4 * 64 * 32 * 32 * 16


def test_the_largest_activations_are_alive_under_their_layers_name(step_plan):
    full_map = 4 * 64 * 32 * 32 * 32
    if step_plan.target == "cpu":
        assert sum(b.nbytes >= full_map for b in step_plan.live) >= 2
        return
    layers = {b.layer for b in step_plan.live if b.nbytes >= full_map}
    assert {"stem", "middle"} <= layers


def test_a_donated_state_is_aliased(step_plan):
    assert step_plan.aliased_bytes == 2 * sum(leaf.size * 4 for leaf in jax.tree.leaves(net_shapes()[0][0]))
    # Besides the state, which takes the place of the old one, nothing comes back.
    table = step_plan.output_bytes - step_plan.aliased_bytes
    assert table <= 8 * 8


@cpu_and_h100
def test_a_state_that_is_kept_is_not_aliased(target):
    found = plan(net_step, *net_shapes(), target=target)
    assert found.aliased_bytes == 0
    parts = found.argument_bytes, found.output_bytes, found.temporary_bytes, found.constant_bytes
    assert found.peak_bytes == sum(parts)


@everywhere
def test_arrays_that_a_function_closes_over_take_memory(target):
    """As much as the same array takes as an argument, but for how a TPU keeps what it will multiply: in bfloat16."""
    kernel = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    closed = plan(lambda x: jnp.sin(x @ kernel), shape(8, 512), target=target)
    given = plan(lambda x, kernel: jnp.sin(x @ kernel), shape(8, 512), shape(512, 512), target=target)
    assert closed.constant_bytes == pytest.approx(kernel.nbytes / (2 if target == "v5e" else 1), abs=1000)
    assert closed.peak_bytes - closed.constant_bytes == pytest.approx(given.peak_bytes - kernel.nbytes, abs=1000)


@needs_cuda
def test_what_is_computed_again_is_said_to_be():
    def network(x, kernels):
        for kernel in kernels:
            x = jnp.sin(conv(x, kernel))
        return x.sum()

    x, kernels = shape(64, 32, 32, 16), [shape(3, 3, 16, 16)] * 3
    roles = {}
    for name, function in (("plain", network), ("again", jax.checkpoint(network))):
        found = plan(jax.value_and_grad(function, 1), x, kernels, target="h100")
        roles[name] = set(found.live_by_role)
    assert "recomputed" in roles["again"]
    assert "recomputed" not in roles["plain"]


_MODULE = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0), metadata={op_name="x"}
  %a = f32[256]{0} sine(%x), metadata={op_name="jit(f)/jvp(Net)/block1/conv/sin"}
  %b = f32[256]{0} negate(%a), metadata={op_name="jit(f)/transpose(jvp(Net))/block1/neg"}
  %c = f32[128]{0} slice(%x), metadata={op_name="x"}
  ROOT %d = f32[256]{0} add(%b, %x)
}
"""
_ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {}:
 value: <0 x @0> (size=1024,offset=0): f32[256]{0}
allocation 1: size 1536, preallocated-temp:
 value: <1 a @0> (size=1024,offset=0): f32[256]{0}
 value: <2 b @0> (size=1024,offset=0): f32[256]{0}
 value: <3 c @0> (size=512,offset=1024): f32[128]{0}
allocation 2: size 9999, color 1, preallocated-temp:
 value: <4 on_chip @1> (size=9999,offset=0): f32[256]{0}
"""
_RANGES = """HloLiveRange (max 5):
  BufferLiveRange:
    x{}:0-5
    a{}:1-2
    b{}:2-4
    c{}:2-3
    on_chip{}:0-5
"""


def test_what_is_done_in_place_is_one_buffer():
    found = liveness.live_at_peak(hlo.parse(_MODULE), _ASSIGNMENT, _RANGES)
    assert [(b.nbytes, b.role, b.layer, b.operation) for b in found] == [
        (1024, "argument", "x", ""),
        (1024, "backward", "block1", "neg"),
        (512, "copy", "x", ""),
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("jit(f)/jvp(ResNet)/stage1_block1/conv1/conv/conv.call/conv/conv_general_dilated", "stage1_block1/conv1/conv"),
        ("jit(f)/transpose(jvp(N))/stem/conv/jvp()/N/stem/conv/remat2", "stem/conv"),
        ("jit(f)/shard_map/while/body/closed_call/jvp(Net)/fire/squeeze/max", "fire/squeeze"),
        ("jit(f)/jvp(transpose(a/b))/mul", ""),
    ],
)
def test_layers_are_named_without_what_jax_wraps_around_them(name, layer):
    assert liveness.layer_of(name)[0] == layer
