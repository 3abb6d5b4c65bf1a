"""The layers of a traced network by name, examples in the groups that influence one another, and checks on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing import independence, validation
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, bind, off_mesh
from mimicnorm_jax.errors import unknown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByLayer:
    """Something of each layer, in the order of evaluation; `jax.jit` would sort a dict by its names."""

    names: tuple[str, ...] = field(metadata={"static": True})
    values: tuple[Any, ...]


@dataclass(frozen=True)
class View:
    """Which layers of a network are looked at, and whether the examples of a batch influence one another.

    Attributes:
      layers: names of layers (see `nngp.names`), or one; None for all.
      batch_coupled: see `diagnostics`.
    """

    layers: str | Sequence[str] | None = None
    batch_coupled: bool = False


EVERYTHING = View()
"""All layers, of a network whose examples are independent."""


def static(view: View) -> View:
    """The same in a form that `jax.jit` takes for static.

    Raises:
      ValueError: for something else than a `View`, such as a layer's name.
    """
    if not isinstance(view, View):
        raise ValueError(f"view is {view!r}: for layers by name say View({view!r})")
    layers = (view.layers,) if isinstance(view.layers, str) else view.layers
    return View(None if layers is None else tuple(layers), view.batch_coupled)


def prepared(apply_fn: ApplyFn, params: Any, x: Any, batch_coupled: bool = True) -> tuple[ApplyFn, Any, jax.Array]:
    """A network, its parameters and inputs in the form that `jax.jit` takes; its products are those of their types.

    Raises:
      ValueError: if these cannot be a network's, or if examples influence one another although `batch_coupled`
        is False.
    """
    validation.arguments(apply_fn, params, x)
    params, x = off_mesh((params, jnp.asarray(x)))
    apply_fn, params = bind(apply_fn, params)
    if not batch_coupled and x.ndim and len(x) > 1:
        independence.require(apply_fn, params, x)
    return _FullPrecision(apply_fn), params, x


@dataclass(frozen=True)
class _FullPrecision:
    """A network whose float32 products, and those of its derivatives, are not rounded as accelerators do by default."""

    apply_fn: ApplyFn

    def __call__(self, params: Any, x: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return self.apply_fn(params, x)


@contextmanager
def forward_mode(what: str) -> Iterator[None]:
    """Names the way out where a hand-written derivative has no forward mode."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(
            f"{what} carries tangents forwards through the network, which a function of jax.custom_vjp cannot: write "
            "its derivative with jax.custom_jvp"
        ) from error


def trace(apply_fn: ApplyFn, params: Any, x: jax.Array, batch_coupled: bool = False) -> TracedNetwork:
    """The network traced for one group of examples: one example or, if `batch_coupled`, all of `x`.

    Raises:
      ValueError: if `x` holds no example.
    """
    if jnp.ndim(x) == 0 or len(x) == 0:
        raise ValueError(f"x has shape {jnp.shape(x)}: give at least one example, (N, ...)")
    return TracedNetwork(apply_fn, params, x if batch_coupled else x[:1])


def coupled_groups(x: jax.Array, batch_coupled: bool = False) -> jax.Array:
    """Examples `(N, ...)` as groups `(n, q, ...)` that influence one another: `q = 1` or, if `batch_coupled`,
    `n = 1`."""
    return x[None] if batch_coupled else x[:, None]


def _layers(network: TracedNetwork) -> list[LayerCall]:
    if not network.layers:
        raise ValueError(
            "apply_fn has no layers to name: it multiplies activations with no kernel that depends on params (inside "
            "lax.scan, while_loop, cond or a custom derivative none is seen). Take the kernels from params, and unroll "
            "such a loop"
        )
    return network.layers


def find(network: TracedNetwork, name: str) -> LayerCall:
    """The layer of that name.

    Raises:
      ValueError: if there is none, with the near misses.
    """
    for layer in _layers(network):
        if layer.name == name:
            return layer
    raise ValueError(unknown("layer", name, [layer.name for layer in network.layers]))


def select(network: TracedNetwork, names: str | Sequence[str] | None) -> list[LayerCall]:
    """The layers of those names, None for all, in the order of evaluation.

    Raises:
      ValueError: for a name that no layer has, or if the network has no layer.
    """
    if names is None:
        return list(_layers(network))
    wanted = {find(network, name).index for name in names}
    return [layer for layer in network.layers if layer.index in wanted]


def example_axis(layer: LayerCall, examples: int, *, of_product: bool) -> int:
    """The axis of a layer's product, or of the activations that it multiplies, that counts a whole batch's examples.

    Raises:
      ValueError: if none has so many places, or several that may.
    """
    shape = layer.shape if of_product else layer.product.x_shape
    axes = layer.product.example_axes[of_product]
    found = [axis for axis in axes if shape[axis] == examples]
    if len(found) != 1:
        raise ValueError(
            f"layer {layer.name!r} {'gives' if of_product else 'reads'} an array of shape {shape}: which axis counts "
            f"the {examples} examples is not clear, of axes {axes}. Take a number of examples that no other axis has, "
            "or leave the layer out by naming others"
        )
    return found[0]


def check_floating(x: jax.Array) -> None:
    """Raises ValueError unless `x` can be differentiated by."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x is {jnp.result_type(x)}: a derivative by it needs floating-point inputs; cast it")


def check_num_samples(num_samples: int) -> None:
    """Raises ValueError if `num_samples` are too few for a standard error."""
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}: a standard error needs at least 2")
