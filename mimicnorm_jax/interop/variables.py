"""Variables of a network in one file of arrays by path, which is what `mimicnorm import-torch` writes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mimicnorm_jax.errors import StateDictError
from mimicnorm_jax.interop.files import read_state_dict


def write_variables(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes variables to a .npz file, in one step.

    Args:
      path: ends in .npz.
      variables: what `model.init` returns: a tree of arrays.

    Raises:
      StateDictError: for another suffix, a folder that is not there, and arrays of a type that .npz has not (bfloat16).
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise StateDictError(f"variables are written to a .npz file, and {path} is none by its name")
    if not path.parent.is_dir():
        raise StateDictError(f"there is no folder {path.parent} to write {path.name} to")
    leaves: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(variables), sep="/").items()}
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
    if Path(path).suffix != ".npz" or not all(name.startswith(("params/", "batch_stats/")) for name in leaves):
        raise StateDictError(f"{path} holds no variables of ours; a PyTorch state dict is for interop.torch.load")
    return unflatten_dict(dict(leaves), sep="/")
