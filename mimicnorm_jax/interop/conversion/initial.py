"""Initial values for a converted network."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mimicnorm_jax.interop.conversion.records import LayerRecord, Report
from mimicnorm_jax.utils.trees import Path, path_names

Tree = TypeVar("Tree")


def rescale_init(params: Tree, report: Report, *, branch_ends: Sequence[str] | None = None) -> Tree:
    """Gives initial kernels the scale that a network without BatchNorms needs; for initial values only.

    BatchNorm makes up for any scale of the kernel before it, so that such networks start with any. Each kernel of which
    the report names a gain is multiplied by one number, so that its mean square becomes `gain**2 * 2 / fan-in`: He's
    variance for an input out of a ReLU, and Theorem 3's for a centered kernel. The kernel that ends the l-th residual
    branch is divided by l besides, as the published scalars 1.2^k / l do (here without a scalar that learns).

    Args:
      params: parameters of linen, or an `nnx.State` with the parameters of NNX; boxed (partitioned) ones too.
      report: of `interop.layer_report`, for the network or for one that it is a part of.
      branch_ends: paths such as `block1/conv2` of the layers that end a residual branch, from the input on; None for
        those whose BatchNorm had a scale that started at 0, which linen's report says.

    Returns:
      The parameters, in their tree.

    Raises:
      ValueError: if a layer of the report has no kernel in `params`, or `branch_ends` one without a gain; if a layer
        that ends residual branches is scanned or vmapped, several in one leaf.
    """
    wanted = _wanted(report, branch_ends)
    found: set[Path] = set()

    def rescaled(path: Any, leaf: jax.Array) -> jax.Array:
        names = path_names(path)
        owner = next((names[:i] for i, name in enumerate(names) if name == "kernel" and names[:i] in wanted), None)
        if owner is None:
            return leaf
        found.add(owner)
        _require_one_branch(wanted[owner], leaf)
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        root = jnp.sqrt((wide**2).mean())
        # Zeros stay zeros.
        return (wide * jnp.where(root > 0, wanted[owner].stddev / jnp.where(root > 0, root, 1), 1)).astype(leaf.dtype)

    scaled = jax.tree_util.tree_map_with_path(rescaled, params)
    if missing := ["/".join(path) for path in wanted if path not in found]:
        raise ValueError(f"the report is not of these parameters, which have no kernel of {', '.join(missing)}")
    return scaled


def _require_one_branch(record: LayerRecord, leaf: jax.Array) -> None:
    """Raises ValueError for the ends of several branches in one leaf, of which the l-th would be divided by l."""
    assert record.shape is not None
    count = leaf.size // math.prod(record.shape)
    if record.block is not None and count > 1:
        raise ValueError(
            f"the kernel of {'/'.join(record.path)} is a stack of {count}, which end residual branches: whether one "
            "after another (nn.scan) or side by side (nn.vmap) the parameters do not say. Name the ends of the others "
            "in branch_ends, and divide these by l afterwards"
        )


def _wanted(report: Report, branch_ends: Sequence[str] | None) -> dict[Path, Any]:
    """Records of the layers whose kernel gets another scale, by path."""
    records = {one.path: one for one in report.layers if one.stddev is not None}
    if branch_ends is not None:
        blocks = {tuple(path.split("/")): block for block, path in enumerate(branch_ends, 1)}
        if unknown := ["/".join(path) for path in blocks if path not in records]:
            known = ", ".join("/".join(path) for path in records)
            raise ValueError(f"branch_ends: {', '.join(unknown)} is no layer with a gain; those are {known}")
        records = {path: replace(one, block=blocks.get(path)) for path, one in records.items()}
    return records
