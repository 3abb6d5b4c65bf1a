"""The networks of the tangent kernel benchmark as plain JAX functions, and one worker process that evaluates them.

Imports nothing of this library but inside `ours`, so that it runs in another environment beside another library.
Reads one request a line (`run`, `quit`) and answers with one JSON object a line; `benchmarks.ntk.compare` starts it.

  python -m benchmarks.ntk.cases ours "a full"
"""

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Apply = Callable[[Any, jax.Array], jax.Array]


def _he(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32)


def _center(kernel: jax.Array) -> jax.Array:
    return kernel - kernel.mean(tuple(range(kernel.ndim - 1)), keepdims=True)


def _keep(kernel: jax.Array) -> jax.Array:
    return kernel


def _conv(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    pad = kernel.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides, strides), [(pad, pad)] * 2, dimension_numbers=numbers)


def _normalize(z: jax.Array) -> jax.Array:
    mean, var = z.mean(0, keepdims=True), z.var(0, keepdims=True)
    return (z - mean) * lax.rsqrt(var + 1e-5)


def dense(width: int, depth: int, inputs: int, outputs: int, transform: Any, norm: Any) -> tuple[Any, Apply]:
    rng = np.random.default_rng(0)
    sides = [inputs, *[width] * depth, outputs]
    params = [(_he(rng, a, b), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sides)]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for i, (kernel, bias) in enumerate(params):
            x = x @ transform(kernel) + bias.reshape(1, -1)
            if i < depth:
                x = jax.nn.relu(norm(x))
        return x

    return params, apply


def convolutional(channels: int, depth: int, outputs: int, transform: Any) -> tuple[Any, Apply]:
    rng = np.random.default_rng(0)
    sides = [3, *[channels] * depth]
    params: Any = {"convs": [_he(rng, 3, 3, a, b) for a, b in itertools.pairwise(sides)]}
    params["biases"] = [np.zeros(channels, np.float32) for _ in range(depth)]
    params["head"] = (_he(rng, channels, outputs), np.zeros(outputs, np.float32))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for kernel, bias in zip(params["convs"], params["biases"], strict=True):
            x = jax.nn.relu(_conv(x, transform(kernel)) + bias.reshape(1, 1, 1, -1))
        kernel, bias = params["head"]
        return x.mean((1, 2)) @ kernel + bias.reshape(1, -1)

    return params, apply


def resnet18(outputs: int) -> tuple[Any, Apply]:
    """He et al.'s ResNet-18 in CIFAR form, without normalization, branches times 0.3."""
    rng = np.random.default_rng(0)
    blocks, before = [], 64
    for stage in range(4):
        for i in range(2):
            after = 64 * 2**stage
            block = {"conv1": _he(rng, 3, 3, before, after), "conv2": _he(rng, 3, 3, after, after)}
            if i == 0 and stage > 0:
                block["shortcut"] = _he(rng, 1, 1, before, after)
            blocks.append(block)
            before = after
    params = {"stem": _he(rng, 3, 3, 3, 64), "blocks": blocks, "head": _he(rng, 512, outputs)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(_conv(x, params["stem"]))
        for block in params["blocks"]:
            strides = 2 if "shortcut" in block else 1
            y = jax.nn.relu(_conv(x, block["conv1"], strides))
            y = _conv(y, block["conv2"]) * 0.3
            x = jax.nn.relu((_conv(x, block["shortcut"], 2) if "shortcut" in block else x) + y)
        return x.mean((1, 2)) @ params["head"]

    return params, apply


@dataclass(frozen=True)
class Case:
    """A network, a number of images and what is asked of its kernel."""

    network: tuple[Any, Apply]
    shape: tuple[int, ...]
    output: str = "full"
    coupled: bool = False


def _dense_case(
    output: str = "full",
    images: int = 64,
    width: int = 1024,
    outputs: int = 10,
    transform: Any = _keep,
    coupled: bool = False,
) -> Callable[[], Case]:
    norm = _normalize if coupled else _keep
    return lambda: Case(dense(width, 5, 784, outputs, transform, norm), (images, 784), output, coupled)


CASES: dict[str, Callable[[], Case]] = {
    "a full": _dense_case(),
    "a trace": _dense_case("trace"),
    "b plain": lambda: Case(convolutional(64, 4, 10, _keep), (32, 16, 16, 3)),
    "b centered": lambda: Case(convolutional(64, 4, 10, _center), (32, 16, 16, 3)),
    "c": lambda: Case(resnet18(10), (8, 32, 32, 3)),
    "d centered": _dense_case(transform=_center),
    "d batchnorm": _dense_case(images=32, coupled=True),
    "d batchnorm, O = 1": _dense_case(images=32, outputs=1, coupled=True),
    **{f"a full, N = {n}": _dense_case(images=n) for n in (16, 32, 128)},
    **{f"a full, O = {o}": _dense_case(outputs=o) for o in (5, 20, 40)},
    **{f"a full, width {w}": _dense_case(width=w) for w in (256, 512, 2048)},
}
"""What may be asked for."""


def ours(case: Case, params: Any, x: jax.Array) -> tuple[Callable[[], Any], float, str]:
    """Our kernel as a function without arguments, planned bytes, and what was chosen."""
    from mimicnorm_jax.diagnostics import EmpiricalNTK

    kernel: Any = EmpiricalNTK(case.network[1], output=case.output, batch_coupled=case.coupled)  # pyright: ignore
    plan = kernel.plan(params, x)
    return lambda: kernel(params, x), float(plan.bytes), str(plan)


def theirs(implementation: str, case: Case, params: Any, x: jax.Array) -> tuple[Callable[[], Any], float | None, str]:
    """neural_tangents' kernel by one of its implementations."""
    # Structured derivatives read two modules where JAX 0.4.38 no longer shows them.
    from jax._src import source_info_util
    from jax.interpreters import ad

    ad.source_info_util, ad.config = source_info_util, jax.config  # pyright: ignore
    import neural_tangents as nt  # pyright: ignore[reportMissingImports]

    axes = (1,) if case.output == "trace" else ()
    options: dict[str, Any] = {} if case.coupled else {"vmap_axes": 0}
    choice = nt.NtkImplementation[implementation]
    function = nt.empirical_ntk_fn(case.network[1], trace_axes=axes, implementation=choice, **options)
    compiled = jax.jit(function).lower(x, None, params).compile()
    planned = compiled.memory_analysis()
    bytes_planned = planned.temp_size_in_bytes + planned.output_size_in_bytes if planned else None
    return lambda: compiled(x, None, params), bytes_planned, implementation


def lower_bound(case: Case, params: Any, x: jax.Array) -> Callable[[], Any]:
    """The bare backward sweeps, one for each output, from the outputs to the first layer's product."""
    from mimicnorm_jax.diagnostics.tracing import TracedNetwork

    groups = x[None] if case.coupled else x[:, None]
    network = TracedNetwork(case.network[1], params, groups[0])
    first = network.layers[0]

    def sweep(params: Any, group: jax.Array) -> jax.Array:
        def outputs(shift: jax.Array) -> jax.Array:
            return network.run(params, group, perturbations={0: shift}, frozen_kernels=True)[0]

        y, pull = jax.vjp(outputs, jnp.zeros(first.shape, first.dtype))
        basis = jnp.eye(y.size).reshape(-1, *y.shape)
        if case.coupled:
            return lax.map(lambda v: pull(v)[0].sum(), basis, batch_size=16)
        return jax.vmap(lambda v: pull(v)[0].sum())(basis)

    compiled = jax.jit(lambda params, groups: jax.vmap(lambda group: sweep(params, group))(groups))
    return lambda: compiled(params, groups)


def main() -> None:
    """`python -m benchmarks.ntk.cases WHO CASE`: answers requests on standard input."""
    who, name = sys.argv[1:3]
    case = CASES[name]()
    params = jax.tree.map(jnp.asarray, case.network[0])
    x = jnp.asarray(np.random.default_rng(1).standard_normal(case.shape), jnp.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if who == "ours":
        run, planned, chosen = ours(case, params, x)
    elif who == "lower_bound":
        run, planned, chosen = lower_bound(case, params, x), None, "backward sweeps"
    else:
        run, planned, chosen = theirs(who, case, params, x)
    result = np.asarray(run())
    ready = {
        "seconds_to_first": time.perf_counter() - started,
        "planned_mb": planned and planned / 1e6,
        "chosen": chosen,
    }
    print(json.dumps(ready | {"shape": result.shape, "sum": float(result.sum())}), flush=True)
    for line in sys.stdin:
        if line.strip() != "run":
            break
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        row = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps(row | {"rss_mb": peak / 1024}), flush=True)


if __name__ == "__main__":
    main()
