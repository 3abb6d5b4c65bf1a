"""State dicts in files: none of the formats can run code."""

import importlib
import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimicnorm_jax.errors import StateDictError

_PYTORCH = (".pth", ".pt", ".bin", ".tar")


def read_state_dict(path: str | Path) -> Mapping[str, Any]:
    """Reads a file by its suffix: PyTorch's through torch with `weights_only=True`, .npz, .safetensors.

    Raises:
      StateDictError: for a file that is missing, damaged, of another format, or a pickle with more than tensors in it,
        and where the format's package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise StateDictError(f"there is no file {path}")
    if path.suffix in _PYTORCH:
        return _read_torch(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise StateDictError(f"{path} is not a state dict by its name: {', '.join((*_PYTORCH, '.npz', '.safetensors'))}")


def _read_torch(path: Path) -> Mapping[str, Any]:
    if importlib.util.find_spec("torch") is None:
        raise StateDictError(
            f"reading {path} needs PyTorch (pip install torch); a .npz or .safetensors file of the same state dict "
            "does not"
        )
    try:
        content = importlib.import_module("torch").load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises depends on what the file is
        raise _unreadable(path, "as a file of tensors only, and one that holds more is refused", error) from error
    if not isinstance(content, Mapping):
        raise StateDictError(f"{path} holds a {type(content).__name__} and not a state dict")
    return content


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path) as content:
            return dict(content)
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "as arrays by name", error) from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise StateDictError(f"reading {path} needs the package safetensors (pip install safetensors)")
    try:
        return importlib.import_module("safetensors.numpy").load_file(path)
    except Exception as error:  # its own error, and what numpy raises
        raise _unreadable(path, "as safetensors", error) from error


def _unreadable(path: Path, how: str, error: Exception) -> StateDictError:
    said = " ".join(str(error).split())[:200]
    return StateDictError(f"{path} cannot be read {how} ({type(error).__name__}: {said})")
