"""Flax's table of a module, with the kernels that are transformed."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.summary import tabulate as flax_tabulate

from mimicnorm_jax.linen.interception import observe
from mimicnorm_jax.linen.selection import LayerKernel, noting


def tabulate(module: nn.Module, rngs: Any, **options: Any) -> Callable[..., str]:
    """`nn.tabulate` with one more column, `kernel`: what each layer reads its kernel through, by the function's name.

    `center` for a centered kernel, `raw` for one that the rule leaves out or that has no transform. No number in the
    table changes. Layers in a lifted transformation (`nn.scan`, `nn.vmap`) are not marked, unless it lifts the
    collection `kernel` too.

    Args:
      module, rngs, options: as `nn.tabulate` takes them.

    Returns:
      What `nn.tabulate` returns: a function of the module's arguments that gives the table.

    Raises:
      ValueError: for what `interop.mimic` made, by the function; `interop.layer_report` says it there.

    Example:
      >>> import jax
      >>> from mimicnorm_jax.linen import CenteredConv
      >>> net = nn.Sequential([CenteredConv(64, (3, 3)), CenteredConv(64, (3, 3))])
      >>> table = tabulate(net, jax.random.key(0), console_kwargs={"force_terminal": False, "width": 200})
      >>> rows = [line for line in table(jnp.ones((1, 8, 8, 3))).splitlines() if "│ CenteredConv" in line]
      >>> ["raw: bool[0]" in row for row in rows], ["center: bool[0]" in row for row in rows]
      ([True, False], [False, True])
    """

    def mark(layer: nn.Module, kernel: LayerKernel) -> None:
        layout = kernel.layout
        if not layer.is_mutable_collection("kernel"):  # a lifted transformation keeps it out
            return
        # Flax's table shows variables only; an empty one counts for nothing.
        for name in kernel.transform.names(layout.flat_shape, layout.groups) or ("raw",):
            layer.put_variable("kernel", name, jnp.zeros((0,), bool))

    table = flax_tabulate(module, rngs, **options)

    def tabulated(*args: Any, **kwargs: Any) -> str:
        with observe(noting(mark)):
            return table(*args, **kwargs)

    return tabulated
