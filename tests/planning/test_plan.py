"""Plans as records, the cache, and what cannot be planned."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

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


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 3}', "{"])
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
    with pytest.raises(PlanError, match="give donate_argnums there"):
        plan(jax.jit(jnp.sin), shape(3), target="cpu", donate=(0,))


def test_a_jitted_function_keeps_its_options():
    donating = jax.jit(jnp.sin, donate_argnums=0)
    assert plan(donating, shape(1024), target="cpu").aliased_bytes == 4096


@needs_tpu
def test_a_tpu_program_that_is_too_large():
    """One product keeps 7.2 GB of bfloat16 as argument, as many for each of two products, and its sine."""
    with pytest.raises(DoesNotFitError, match=r"does not fit v5e: it needs 2\d\.\d+ GiB of 15\.75") as caught:
        plan(lambda x: jnp.sin(x @ x) @ (x @ x), shape(60000, 60000, dtype=jnp.bfloat16), target="v5e")
    assert caught.value.needed > caught.value.available


@needs_cuda
def test_a_gpu_program_that_is_too_large_has_a_plan():
    found = plan(lambda x: x @ x, shape(200_000, 200_000, dtype=jnp.bfloat16), target="h100")
    assert not found.fits
    assert found.peak_bytes >= 2 * 2 * 200_000**2
    assert "does not fit" in str(found)
