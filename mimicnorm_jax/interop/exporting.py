"""Networks as files that run without this package: StableHLO by `jax.export`, ONNX by jax2onnx."""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import core

from mimicnorm_jax.errors import ExportError, unknown
from mimicnorm_jax.methods import FlaxActivation, LeanActivation
from mimicnorm_jax.models import LayerFactory
from mimicnorm_jax.utils.files import write_bytes

FORMATS: dict[str, tuple[str, ...]] = {"stablehlo": ("flatbuffers",), "onnx": ("jax2onnx", "onnxruntime")}
"""Every format, with the packages that it needs beside this package's own dependencies."""
PLATFORMS = ("cpu", "cuda", "tpu")
"""That one StableHLO file runs on."""
ONNX_TOLERANCE = 1e-4
"""How far ONNX's logits may be from the network's own, relative to the largest."""
INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True)
class _Program:
    """A network at its variables as a function of images alone.

    Attributes:
      call: images `(B, H, W, C)` to logits `(B, classes)`.
      images: their shape, the batch symbolic.
    """

    call: Callable[[jax.Array], jax.Array]
    images: jax.ShapeDtypeStruct


def export(
    model: nn.Module,
    variables: Mapping[str, Any],
    path: str | Path,
    *,
    image_shape: tuple[int, int, int],
    format: str = "stablehlo",
    vjp_order: int = 0,
) -> None:
    """Writes a network in evaluation, with its variables, as one file for any batch size; in one step.

    Args:
      model: any Flax module; `model.apply(variables, images)` is what is written. `interop.fold` before makes it a
        network of plain convolutions.
      variables: of it.
      path: of the file.
      image_shape: `(H, W, C)` of the float32 images that the file takes, normalized as in training.
      format: `stablehlo`, for JAX on a CPU, on CUDA and on TPUs, or `onnx`.
      vjp_order: how often what is read back can be differentiated by the images; only for `stablehlo`.

    Raises:
      ExportError: names what is in the way: an image size that is not fixed or not the network's, an unknown format, a
        package that is not installed, an operation that ONNX has not, a path that cannot be a file. Nothing is written.

    Example:
      >>> export(nn.Dense(3), {}, "dense.onnx", image_shape=(None, None, 1))
      Traceback (most recent call last):
      mimicnorm_jax.errors.ExportError: image_shape is (None, None, 1), and a file is for images of one size: give
      (H, W, C) as whole numbers
    """
    path = Path(path)
    if format not in FORMATS:
        raise ExportError(unknown("format", format, FORMATS))
    require_file(path)
    if vjp_order < 0 or (vjp_order and format != "stablehlo"):
        raise ExportError(f"vjp_order is {vjp_order}: it is at least 0, and 0 in every format but stablehlo")
    # On the host: what is spread over devices would make a file for as many.
    held = jax.tree.map(np.asarray, nn.meta.unbox(dict(variables)))
    program = _program(model, held, image_shape)
    for package in FORMATS[format]:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"format={format!r} needs the package {package}: pip install 'mimicnorm_jax[export]'")
    content = _stablehlo(program, vjp_order) if format == "stablehlo" else _onnx(program)
    try:
        write_bytes(path, content)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}. Name another file") from error


def require_file(path: Path) -> None:
    """Raises ExportError if a path is a folder, in none, or in one that cannot be written to."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder: name the file to write, such as {path / 'network'}")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} to")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"cannot write {path.name} to {path.parent}: name a file in a folder of your own")


def _program(model: Any, variables: Mapping[str, Any], image_shape: Any) -> _Program:
    fixed = isinstance(image_shape, tuple | list) and len(image_shape) == 3
    if not (fixed and all(isinstance(side, int | np.integer) and side > 0 for side in image_shape)):
        raise ExportError(
            f"image_shape is {image_shape}, and a file is for images of one size: give (H, W, C) as whole numbers"
        )
    model = _without_backward_pass(model)

    def call(images: jax.Array) -> jax.Array:
        return model.apply(variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    try:
        logits = jax.eval_shape(call, images)
    except Exception as error:  # whatever a module raises
        raise ExportError(
            f"the {type(model).__name__} with these variables does not take images {tuple(image_shape)} in batches of "
            f"any size: {_said(error)}"
        ) from error
    if not isinstance(logits, jax.ShapeDtypeStruct) or logits.shape[:1] != (batch,):
        raise ExportError(
            f"the {type(model).__name__} does not map each image of a batch to a row of one array: {logits}"
        )
    return _Program(call, images)


def _without_backward_pass(model: Any) -> Any:
    """A network of this package without what it does for the memory of its backward pass alone."""
    if not isinstance(getattr(model, "factory", None), LayerFactory):
        return model
    method = model.factory.method
    if isinstance(method.activation, LeanActivation):
        method = replace(method, activation=FlaxActivation(method.activation.gain))
    return model.clone(factory=replace(model.factory, method=method, recompute_kernel=False, remat="none"))


def _stablehlo(program: _Program, vjp_order: int) -> bytes:
    exported = jax.export.export(jax.jit(program.call), platforms=PLATFORMS)(program.images)
    return bytes(exported.serialize(vjp_order=vjp_order))


def _onnx(program: _Program) -> bytes:
    # Traced here, since jax2onnx replaces functions that initializers call, which Flax traces for their shapes.
    traced = jax.make_jaxpr(program.call)(program.images)
    try:
        with _silence():
            proto = importlib.import_module("jax2onnx").to_onnx(
                partial(_pooled_by_flax, traced),
                [program.images],
                model_name="network",
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
        content = proto.SerializeToString()
        _require_same(program, content)
    except ExportError:
        raise
    except Exception as error:  # of every kind, for operations that it or the runtime does not know
        raise ExportError(
            f"jax2onnx cannot convert the network: {_said(error)}. interop.fold makes it simpler, and stablehlo takes "
            "every network"
        ) from error
    return content


def _pooled_by_flax(traced: Any, images: jax.Array) -> jax.Array:
    """A traced network, its max-pooling by the one function of which jax2onnx makes an operation that runtimes know."""
    jaxpr, values = traced.jaxpr, {}
    values |= zip(jaxpr.constvars, traced.consts, strict=True)
    values |= zip(jaxpr.invars, [images], strict=True)
    for eqn in jaxpr.eqns:
        inputs = list(dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, core.Literal)))
        arrays = [values[atom] for atom in inputs]
        if eqn.primitive.name == "reduce_window_max":
            outputs = [_max_pool(*arrays, **eqn.params)]
        else:
            alone = core.Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects)
            outputs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*arrays)
        values |= zip(eqn.outvars, outputs, strict=True)
    (output,) = jaxpr.outvars
    return values[output]


def _max_pool(x: jax.Array, *, window_dimensions: Any, window_strides: Any, padding: Any, **_: Any) -> jax.Array:
    if any(map(any, padding)):
        x = jnp.pad(x, padding, constant_values=-jnp.inf)
    return nn.max_pool(x, window_shape=window_dimensions[1:-1], strides=window_strides[1:-1], padding="VALID")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """jax2onnx prints what it does, and logs plugins for packages that are not there."""
    logger = logging.getLogger("jax2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require_same(program: _Program, content: bytes) -> None:
    images = np.random.default_rng(0).normal(size=(2, *program.images.shape[1:])).astype(np.float32)
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    (theirs,) = session.run([OUTPUT], {INPUT: images})
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(program.call)(images))
    apart, size = abs(theirs - ours).max(), abs(ours).max()
    if not apart <= ONNX_TOLERANCE * size:
        raise ExportError(
            f"the ONNX file gives logits that are {apart:.2g} away from the network's, of at most {size:.2g}"
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
