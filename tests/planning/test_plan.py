"""Plans as records, the cache, and what cannot be planned."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from mimicnorm_jax.errors import DoesNotFitError, PlanError
from mimicnorm_jax.planning import Cache, Plan, plan, target
from tests.planning.programs import needs_cuda, needs_tpu, net_shapes, net_step, shape

pytestmark = pytest.mark.optimized


@pytest.fixture
def compilations(monkeypatch):
    """One entry for every program that was compiled."""
    seen = []
    real = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *a, **options: seen.append(a) or real(*a, **options))
    return seen


def test_a_plan_survives_json():
    found = plan(net_step, *net_shapes(2), target="cpu", donate=(0,))
    assert Plan.from_json(found.to_json()) == found
    assert found.live


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 4}', "{"])
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_a_program_is_compiled_once(tmp_path, compilations):
    cache = Cache(tmp_path)

    def program(x):
        return jnp.sin(x) + 1

    first = plan(program, shape(64), target="cpu", cache=cache)
    assert plan(program, shape(64), target="cpu", cache=cache) == first
    assert len(compilations) == 1
    plan(program, shape(65), target="cpu", cache=cache)
    plan(lambda x: jnp.sin(x) + 2, shape(64), target="cpu", cache=cache)
    plan(program, shape(64), target=dataclasses.replace(target("cpu"), memory=2**30), cache=cache)
    assert len(compilations) == 4


def test_a_line_that_moved_is_no_other_program(tmp_path, compilations):
    source = "def program(x):\n    return jnp.sin(x) * 3\n"
    for lines in (0, 7):
        space = {"jnp": jnp}
        exec(compile_text("\n" * lines + source, f"{lines}.py"), space)
        plan(space["program"], shape(64), target="cpu", cache=Cache(tmp_path))
    assert len(compilations) == 1


def compile_text(source, name):
    import builtins

    return builtins.compile(source, name, "exec")


def test_a_cached_plan_has_todays_share_of_the_gpu_and_todays_flags(tmp_path, monkeypatch, compilations):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    described = dataclasses.replace(target("cpu"), memory=2**30)
    for fraction in (0.5, 0.9):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", f"{fraction}")
        found = plan(jnp.sin, shape(64), target=described, cache=Cache(tmp_path))
        assert found.usable_bytes == int(fraction * 2**30)
    assert len(compilations) == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")  # read by a new process
    plan(jnp.sin, shape(64), target=described, cache=Cache(tmp_path))
    assert len(compilations) == 2


def test_a_plan_of_other_compiler_options_is_another(tmp_path, compilations):
    for options in ({}, {"xla_cpu_enable_fast_min_max": True}):
        plan(jax.jit(jnp.sin, compiler_options=options), shape(64), target="cpu", cache=Cache(tmp_path))
    assert len(compilations) == 2


def test_a_layer_of_another_name_is_planned_again(tmp_path, compilations):
    def program(x, name):
        with jax.named_scope(name):
            return jnp.sin(x)

    for name in ("one", "two"):
        plan(lambda x, name=name: program(x, name), shape(64), target="cpu", cache=Cache(tmp_path))
    assert len(compilations) == 2


def test_a_damaged_cache_costs_a_compilation_only(tmp_path, compilations):
    first = plan(jnp.cos, shape(8), target="cpu", cache=Cache(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-5])
    assert plan(jnp.cos, shape(8), target="cpu", cache=Cache(tmp_path)) == first
    file.unlink()
    file.mkdir()  # nothing can be written under this name
    assert plan(jnp.cos, shape(8), target="cpu", cache=Cache(tmp_path)) == first
    assert len(compilations) == 3
    assert list(tmp_path.iterdir()) == [file]


@needs_cuda
def test_jaxs_own_cache_does_not_hide_the_report(tmp_path):
    """A program that JAX finds in its cache is not compiled, and no report is written."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        for _ in range(2):
            assert plan(net_step, *net_shapes(4), target="h100").live
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert jax.config.jax_enable_compilation_cache


def test_what_cannot_be_traced():
    def branching(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(PlanError, match=r"cannot trace .*branching with these shapes: TracerBoolConversionError"):
        plan(branching, shape(3), target="cpu")
    with pytest.raises(PlanError, match="cannot trace"):
        plan(lambda a, b: a @ b, shape(3, 4), shape(3, 4), target="cpu")
    with pytest.raises(PlanError, match=r"an argument is 'mean', no array or number: bind it by functools\.partial"):
        plan(lambda x, how: x, shape(3), "mean", target="cpu")
    with pytest.raises(PlanError, match="give donate_argnums there"):
        plan(jax.jit(jnp.sin), shape(3), target="cpu", donate=(0,))


def test_a_number_takes_its_type_from_the_array_that_it_meets():
    """As in a call of the function: bfloat16 times 2.0 is bfloat16, and times a float32 array is not."""
    x = shape(1024, dtype=jnp.bfloat16)
    abstract = jax.eval_shape(lambda: 2.0)
    assert [plan(jnp.multiply, x, by, target="cpu").output_bytes for by in (2.0, abstract, jnp.float32(2))] == [
        2 * 1024,
        2 * 1024,
        4 * 1024,
    ]


@needs_cuda
def test_arguments_that_are_elsewhere_go_to_the_target():
    """The state of a run on a CPU, planned for a GPU: not what the CPU's compiler makes of it."""
    here = SingleDeviceSharding(jax.devices("cpu")[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=here)
    assert plan(_product, x, target="h100") == plan(_product, shape(256, 256), target="h100")
    with pytest.raises(PlanError, match="without an argument JAX compiles for a CPU, and the target is h100"):
        plan(lambda: jnp.ones((256, 256)), target="h100")


def test_shardings_on_the_targets_devices_are_kept_and_others_follow_them():
    two = Mesh(jax.devices("cpu")[:2], ("batch",))
    rows, every = (NamedSharding(two, PartitionSpec(*axes)) for axes in (("batch",), ()))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows)
    told = plan(jnp.multiply, x, jax.ShapeDtypeStruct((1, 256), jnp.float32, sharding=every), target="cpu")
    assert (told.devices, told.argument_bytes) == (2, 4 * 256 * (128 + 1))
    assert plan(jnp.multiply, jax.device_put(jnp.ones((256, 256)), rows), shape(1, 256), target="cpu") == told
    assert plan(jnp.multiply, x, 2.0, target="cpu").devices == 2


def test_where_some_arguments_are_in_host_memory_the_others_are_on_its_device():
    other = jax.devices("cpu")[1]
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=SingleDeviceSharding(other, memory_kind="pinned_host"))
    assert plan(jnp.add, x, shape(8, 8), target="cpu").argument_bytes == 2 * 4 * 64


def test_a_mesh_of_no_devices_is_refused():
    rows = NamedSharding(AbstractMesh((2,), ("batch",)), PartitionSpec("batch"))
    with pytest.raises(PlanError, match="whose mesh is of no devices: give one over the target's"):
        plan(jnp.sin, jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows), target="cpu")


@needs_cuda
def test_arguments_that_are_spread_elsewhere_are_refused():
    rows = NamedSharding(Mesh(jax.devices("cpu")[:2], ("batch",)), PartitionSpec("batch"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows)
    with pytest.raises(PlanError, match="an argument is spread over 2 x cpu, and the target is h100: give it as"):
        plan(_product, x, target="h100")


def _product(a):
    return jnp.sin(a @ a)


def test_a_jitted_function_keeps_its_options():
    donating = jax.jit(jnp.sin, donate_argnums=0)
    assert plan(donating, shape(1024), target="cpu").aliased_bytes == 4096


@needs_tpu
def test_a_tpu_program_that_is_too_large():
    """One product keeps 7.2 GB of bfloat16 as argument, as many for each of two products, and its sine."""
    with pytest.raises(DoesNotFitError, match=r"does not fit v5e: it needs 2\d\.\d+ GiB of 15\.75") as caught:
        plan(lambda x: jnp.sin(x @ x) @ (x @ x), shape(60000, 60000, dtype=jnp.bfloat16), target="v5e")
    assert caught.value.needed > caught.value.available


@needs_tpu
def test_what_is_too_much_is_what_one_device_lacks():
    """Of 16 GB of arguments a chip has a quarter; libtpu names its temporaries alone."""
    rows = NamedSharding(Mesh(target("v5e:2x2").jax_devices(), ("batch",)), PartitionSpec("batch"))
    x = jax.ShapeDtypeStruct((4 * 40_000, 50_000), jnp.bfloat16, sharding=rows)
    with pytest.raises(DoesNotFitError) as caught:
        plan(lambda x: jnp.sort(jnp.sin(x), 1) + jnp.sort(jnp.cos(x), 1), x, target="v5e:2x2")
    temporaries = re.search(r"temporaries \(([\d.]+)G\)", str(caught.value.__cause__))
    assert caught.value.needed - int(float(temporaries[1]) * 2**30) == 2 * 40_000 * 50_000


@needs_cuda
def test_a_gpu_program_that_is_too_large_has_a_plan():
    found = plan(lambda x: x @ x, shape(200_000, 200_000, dtype=jnp.bfloat16), target="h100")
    assert not found.fits
    assert found.peak_bytes >= 2 * 2 * 200_000**2
    assert "does not fit" in str(found)
