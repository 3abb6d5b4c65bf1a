"""Compiles a function for a target and reads the plan."""

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mimicnorm_jax.errors import DoesNotFitError, PlanError
from mimicnorm_jax.planning import hlo, liveness, traffic
from mimicnorm_jax.planning.cache import Cache
from mimicnorm_jax.planning.plans import Plan
from mimicnorm_jax.planning.targets import Target, target

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that change what a compiler makes of a program."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    function: Callable[..., Any],
    *shapes: Any,
    target: Target | str,
    donate: tuple[int, ...] = (),
    cache: Cache | None = None,
) -> Plan:
    """Compiles a function for a device that need not be there, and says what it will take.

    Args:
      function: any that JAX can compile, or one that `jax.jit` returned.
      *shapes: its arguments, trees of arrays, numbers or `jax.ShapeDtypeStruct`; at least one for another device than
        a CPU. Those with a sharding on the target's devices (`Target.jax_devices`) keep it. Others go whole to each of
        these devices; where no argument has one, to the target's first.
      target: from `targets.target`, or its name.
      donate: numbers of the arguments whose memory the results may take; of a function not jitted yet.
      cache: of plans; None compiles always.

    Raises:
      PlanError: if there is no such target, its plugin is missing, or the function cannot be traced or compiled.
      DoesNotFitError: if the target's compiler refuses the program for want of memory, as a TPU's does.

    Example:
      >>> import jax.numpy as jnp
      >>> square = plan(jnp.square, jax.ShapeDtypeStruct((1024,), jnp.float32), target="cpu")
      >>> square.argument_bytes, square.output_bytes, square.total_moved
      (4096, 4096, 8192)
    """
    found = _target(target)
    placed = _placed(shapes, found)
    if found.platform != "cpu" and not jax.tree.leaves(placed):
        raise PlanError(f"without an argument JAX compiles for a CPU, and the target is {found.name}: give it one")
    lowered = lower(function, *placed, donate=donate)
    versions = _versions()
    key = cache and cache.key(lowered.as_text(debug_info=True), f"{found}", f"{versions}", _options(lowered))
    if cache and key and (known := cache.get(key)):
        # The share of a GPU that a program can have is set anew for every run.
        return dataclasses.replace(known, usable_bytes=found.usable)
    made = _read(lowered, found, placed, versions)
    if cache and key:
        cache.put(key, made)
    return made


def _options(lowered: Any) -> str:
    """What a compiler is told beside the program: by variables, and by `jax.jit(compiler_options=)`."""
    told = getattr(getattr(lowered, "_lowering", None), "_compiler_options_kvs", ())  # JAX shows it nowhere else
    return f"{[os.environ.get(name) for name in _FLAGS]} {told}"


def _target(name: Target | str) -> Target:
    return target(name) if isinstance(name, str) else name


def lower(function: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()) -> Any:
    """Traces a function.

    Raises:
      PlanError: if it cannot be.
    """
    name = getattr(function, "__qualname__", repr(function))
    if hasattr(function, "lower") and donate:
        raise PlanError(f"{name} is compiled by jax.jit already: give donate_argnums there")
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function, donate_argnums=donate)
    try:
        return jitted.lower(*shapes)
    except Exception as error:  # whatever the function raises while it is traced
        reason = " ".join(str(error).split())[:600]
        raise PlanError(f"jax.jit cannot trace {name} with these shapes: {type(error).__name__}: {reason}") from error


def _placed(shapes: Any, found: Target) -> Any:
    """All arguments with a sharding on the target's devices."""
    given = [_given(leaf, found) for leaf in jax.tree.leaves(shapes)]
    others = _whole(next((sharding for sharding in given if sharding is not None), None), found)
    return jax.tree.unflatten(
        jax.tree.structure(shapes),
        [_described(leaf, sharding or others) for leaf, sharding in zip(jax.tree.leaves(shapes), given, strict=True)],
    )


def _given(leaf: Any, found: Target) -> Sharding | None:
    """The sharding that an argument has on the target's devices."""
    has_one = isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.committed)
    if not has_one or leaf.sharding is None:
        return None
    if isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, AbstractMesh):
        raise PlanError(
            f"an argument has the sharding {leaf.sharding}, whose mesh is of no devices: give one over the target's "
            "jax_devices()"
        )
    kinds, kind = {device.device_kind for device in leaf.sharding.device_set}, found.jax_devices()[0].device_kind
    if kinds == {kind}:
        return leaf.sharding
    if len(leaf.sharding.device_set) > 1:
        raise PlanError(
            f"an argument is spread over {len(leaf.sharding.device_set)} x {', '.join(sorted(kinds))}, and the target "
            f"is {found.name}: give it as jax.ShapeDtypeStruct with a sharding over the target's jax_devices()"
        )
    return None


def _whole(beside: Sharding | None, found: Target) -> Sharding:
    """Of what has no sharding: where the others are, as `jax.jit` puts it."""
    if isinstance(beside, NamedSharding):
        return NamedSharding(beside.mesh, PartitionSpec())
    return SingleDeviceSharding(next(iter(beside.device_set)) if beside is not None else found.jax_devices()[0])


def _described(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    try:
        shape = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    except TypeError as error:
        raise PlanError(f"an argument is {leaf!r}, no array or number: bind it by functools.partial") from error
    # A Python number takes its type from what it meets: a float32 array in its place would not.
    weak = getattr(shape, "weak_type", False)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding, weak_type=weak)


def _devices(shapes: Any) -> int:
    return max((len(leaf.sharding.device_set) for leaf in jax.tree.leaves(shapes)), default=1)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """A program that JAX has cached comes without the compiler's report."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once in a process, at the first program, whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _read(lowered: Any, found: Target, placed: Any, versions: dict[str, str]) -> Plan:
    with tempfile.TemporaryDirectory(prefix="mimicnorm_plan_") as folder:
        compiled = _compile(lowered, found, placed, folder)
        dump = liveness.read_dump(Path(folder))
    module = hlo.parse(compiled.as_text())
    work = traffic.work(module)
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis()
    replaced = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    constants = 0 if dump is None else liveness.constant_bytes(dump[0])
    bound, by = _bound(found, module, work)
    return Plan(
        target=found.name,
        devices=_devices(placed),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        constant_bytes=constants,
        peak_bytes=replaced + memory.temp_size_in_bytes + constants,
        usable_bytes=found.usable,
        flops=work.flops,
        bytes_moved={name: work.moved[name] for name in traffic.CLASSES},
        bytes_accessed=(costs or {}).get("bytes accessed"),
        unknown_loops=work.unknown_loops,
        convolutions=traffic.convolutions(module),
        live=() if dump is None else liveness.live_at_peak(module, *dump),
        bound_seconds=bound,
        bound_by=by,
        versions=versions,
    )


def _compile(lowered: Any, found: Target, placed: Any, folder: str) -> Any:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        with no_compilation_cache():
            return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise PlanError(f"the compiler of {found.name} refuses the program: {text[:600]}") from error
        needed, available = _exhausted(text, _argument_bytes(placed))
        sizes = "" if needed is None or available is None else _missing(needed, available)
        raise DoesNotFitError(
            f"the program does not fit {found.name}{sizes}: give it smaller shapes", needed, available
        ) from error


def _exhausted(text: str, arguments: int) -> tuple[int | None, int | None]:
    """Bytes needed and available, from libtpu's words; where it names temporaries alone, arguments are added."""
    whole = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text)
    temporaries = re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", text)
    match = whole or temporaries
    if not match:
        return None, None
    needed, available = (int(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
    return needed if whole else needed + arguments, available


def _argument_bytes(placed: Any) -> int:
    """What the arguments take of one device."""
    leaves = jax.tree.leaves(placed)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _missing(needed: int, available: int) -> str:
    gib = 2**30
    return f": it needs {needed / gib:.2f} GiB of {available / gib:.2f}, {(needed - available) / gib:.2f} GiB too much"


def _bound(found: Target, module: hlo.Module, work: traffic.Work) -> tuple[float | None, str]:
    if found.bandwidth is None or not found.peak:
        return None, ""
    # A program that multiplies float32 anywhere may do so everywhere else in bfloat16: the faster rate is the bound.
    bits = traffic.narrowest(module)
    rate = max(found.peak.values()) if bits <= 16 else found.peak["float32"]
    # Of 8 bits and fewer, which are faster still, no rate is known.
    times = {"flops": 0 if bits < 16 else work.flops / rate, "bytes": sum(work.moved.values()) / found.bandwidth}
    by = max(times, key=lambda name: times[name])
    return times[by], by
