"""PyTorch state dicts of the published networks, torchvision's among them, to variables of ours and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mimicnorm_jax.errors import StateDictError
from mimicnorm_jax.interop.files import read_state_dict
from mimicnorm_jax.interop.layouts import to_flax, to_torch, torch_shape
from mimicnorm_jax.interop.rules import Rules, rules_of
from mimicnorm_jax.methods import Method

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_SHOWN = 6


@dataclass(frozen=True)
class _Entry:
    """One array of a network.

    Attributes:
      path: in the variables, collection first.
      shape, dtype: there.
      pixels: see `Rules.pixels`.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    pixels: int


def load(
    source: str | Path | Mapping[str, Any], model: nn.Module, *, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Reads a PyTorch state dict into variables of our network.

    The published networks of the paper's code under batchnorm, mimicnorm (and weightmean, lastbn, none, which have its
    parameters) and fixup; torchvision's ResNets, VGGs and ShuffleNets into the ImageNet forms under batchnorm. Kernels
    may be centered or not: the layers center them.

    Args:
      source: a state dict of tensors or arrays, or a file of one: see `files.read_state_dict`. It may stand under
        `state_dict` among other entries, and its names may begin with `module.`, as DataParallel writes them.
      model: from `models.create`, with the network's number of classes.
      image_shape: that the network takes, `(H, W, C)`; by default what it was published for.

    Returns:
      `params` and, where there are norms, `batch_stats`: numpy arrays, of the model's dtypes.

    Raises:
      StateDictError: names all that is missing, unexpected, or of another shape; nothing is built then. Also for a file
        that cannot be read without running code, and for a network that PyTorch code has no names for.

    Example:
      >>> from mimicnorm_jax import models
      >>> model = models.create("resnet8", method="mimicnorm", num_classes=10)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> variables = jax.tree.map(lambda leaf: np.random.default_rng(0).random(leaf.shape, np.float32), shapes)
      >>> state_dict = dump(variables, model)
      >>> state_dict["conv2_x.0.residual_function.0.weight"].shape
      (16, 16, 3, 3)
      >>> jax.tree.all(jax.tree.map(np.array_equal, load(state_dict, model), dict(variables)))
      True
    """
    rules = rules_of(model)
    entries = _entries(model, rules, image_shape)
    given = _arrays(source if isinstance(source, Mapping) else read_state_dict(source), rules, entries)
    wanted = {name: torch_shape(entry.shape) for name, entry in entries.items()}
    _require_equal(wanted, {name: array.shape for name, array in given.items()}, "the state dict", model)
    arrays = {
        entry.path: np.array(to_flax(given[name], entry.shape, entry.pixels), entry.dtype, order="C")
        for name, entry in entries.items()
    }
    return unflatten_dict(arrays)


def dump(
    variables: Mapping[str, Any], model: nn.Module, *, image_shape: tuple[int, int, int] | None = None
) -> dict[str, np.ndarray]:
    """Writes variables of our network as a state dict: the inverse of `load`.

    Args:
      variables: `params` and `batch_stats` of the model.
      model: from `models.create`.
      image_shape: as in `load`.

    Returns:
      Contiguous arrays by PyTorch's names, in its layouts; PyTorch adds BatchNorm's `num_batches_tracked`, of which
      nothing is known here, itself. Parameters that the published network does not use are zeros.

    Raises:
      StateDictError: names all that is missing, unexpected, or of another shape; and as `load`.
    """
    rules = rules_of(model)
    entries = _entries(model, rules, image_shape)
    given: dict[tuple[str, ...], Any] = flatten_dict({name: variables[name] for name in variables})
    shapes = {"/".join(path): np.shape(leaf) for path, leaf in given.items()}
    wanted = {"/".join(entry.path): entry.shape for entry in entries.values()}
    _require_equal(wanted, shapes, "the tree of variables", model)
    arrays = {name: to_torch(np.asarray(given[entry.path]), entry.pixels) for name, entry in entries.items()}
    return arrays | {name: np.zeros(1, np.float32) for name in rules.unused}


def names(model: nn.Module, *, image_shape: tuple[int, int, int] | None = None) -> dict[str, tuple[str, ...]]:
    """PyTorch's name of every array of a network, with its path in our variables.

    Args:
      model: a network of ours.
      image_shape: `(H, W, C)` of its images; None for the published ones'.

    Raises:
      StateDictError: if an array has no name there, or two have one.
    """
    return {name: entry.path for name, entry in _entries(model, rules_of(model), image_shape).items()}


def _entries(model: nn.Module, rules: Rules, image_shape: tuple[int, int, int] | None) -> dict[str, _Entry]:
    """What the network has, by PyTorch's name; nothing is computed."""
    image = jax.ShapeDtypeStruct((2, *(image_shape or rules.image_shape)), jnp.float32)
    leaves: dict[tuple[str, ...], Any] = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image))
    modules = rules.modules(_method(model))
    entries: dict[str, _Entry] = {}
    for path, leaf in leaves.items():
        name = _name(path[1:], rules, modules)
        if name in entries:
            raise StateDictError(f"{'/'.join(path)} and {'/'.join(entries[name].path)} have one name there, {name}")
        entries[name] = _Entry(path, leaf.shape, leaf.dtype, rules.pixels(path[1], leaf.shape))
    return entries


def _name(path: tuple[str, ...], rules: Rules, modules: Mapping[str, str]) -> str:
    block, rest = rules.split(path)
    *module, leaf = rest
    whole, owner = "/".join(rest), "/".join(module)
    if whole in modules:
        return modules[whole].format(block)
    if owner not in modules:
        raise StateDictError(f"{'/'.join(path)} has no name in PyTorch's code of this network")
    return f"{modules[owner].format(block)}.{_LEAVES[leaf]}"


def _arrays(content: Mapping[str, Any], rules: Rules, entries: Mapping[str, _Entry]) -> dict[str, np.ndarray]:
    """The entries of a state dict that a network could have, on the host."""
    content = content.get("state_dict", content)
    if not isinstance(content, Mapping):
        raise StateDictError(f"state_dict is a {type(content).__name__} and not arrays by name")
    if content and all(str(name).startswith("module.") for name in content):
        content = {name.removeprefix("module."): array for name, array in content.items()}
    counters = {name.replace("running_mean", _COUNTER) for name in entries if name.endswith(".running_mean")}
    left_out = counters.union(rules.unused)
    return {str(name): _array(str(name), array) for name, array in content.items() if name not in left_out}


def _array(name: str, array: Any) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        # numpy has no bfloat16 of its own, and float32 holds each of its numbers.
        array = (array.float() if "bfloat16" in str(array.dtype) else array).numpy()
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise StateDictError(f"{name} is of {array.dtype} and not an array of floating-point numbers")
    return array


def _require_equal(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str, model: nn.Module
) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {given[name]} instead of {wanted[name]}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(kinds.values()):
        said = "; ".join(f"{kind}: {_shown(found)}" for kind, found in kinds.items() if found)
        raise StateDictError(
            f"{what} is not that of this {type(model).__name__} under method={_method(model).name!r}: {said}. Create "
            "the model that it belongs to: network, method, num_classes, width",
            missing,
            unexpected,
            misshapen,
        )


def _method(model: Any) -> Method:
    return model.factory.method


def _shown(found: list[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
