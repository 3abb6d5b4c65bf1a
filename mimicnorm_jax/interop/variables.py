"""Variables of a network in one file of arrays by path, which is what `mimicnorm import-torch` writes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mimicnorm_jax.errors import StateDictError
from mimicnorm_jax.interop.files import read_state_dict

COLLECTIONS = ("params", "batch_stats")
"""Of variables that a file holds."""


def write_variables(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes variables to a .npz file, in one step.

    Args:
      path: ends in .npz.
      variables: what `model.init` returns: `params` and, where there are, `batch_stats`; boxes (`nn.Partitioned`) are
        left out.

    Raises:
      StateDictError: for another suffix, a folder that is not there, another collection, a name with a slash (as
        `nn.WeightNorm` makes them), which separates names in the file, and arrays of a type that .npz has not
        (bfloat16).
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise StateDictError(f"variables are written to a .npz file, and {path} is none by its name")
    if not path.parent.is_dir():
        raise StateDictError(f"there is no folder {path.parent} to write {path.name} to")
    by_path: dict[tuple[str, ...], Any] = flatten_dict(nn.meta.unbox(dict(variables)))
    if foreign := sorted({names[0] for names in by_path} - set(COLLECTIONS)):
        raise StateDictError(
            f"the collection {foreign[0]!r} has no place in {path.name}: only {' and '.join(COLLECTIONS)}"
        )
    if slashed := [name for names in by_path for name in names if "/" in name]:
        raise StateDictError(f"the name {slashed[0]!r} has a slash, which separates names in {path.name}")
    leaves: dict[str, Any] = {"/".join(names): np.asarray(leaf) for names, leaf in by_path.items()}
    if odd := [name for name, leaf in leaves.items() if leaf.dtype.kind not in "fiub"]:
        raise StateDictError(f"{odd[0]} is of {leaves[odd[0]].dtype}, which .npz files cannot hold: cast it to float32")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **leaves)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_variables(path: str | Path) -> dict[str, Any]:
    """Reads what `write_variables` wrote, bit for bit: a tree of numpy arrays.

    Raises:
      StateDictError: if it is no such file.
    """
    leaves = read_state_dict(path)
    if Path(path).suffix != ".npz" or not all(name.split("/")[0] in COLLECTIONS for name in leaves):
        raise StateDictError(f"{path} holds no variables of ours; a PyTorch state dict is for interop.torch.load")
    return unflatten_dict(dict(leaves), sep="/")
