"""Writes the network of a run as one file that runs without this package, for any batch size; reads no image.

mimicnorm export --workdir=RUN --format=stablehlo|onnx

Centering, scalars and norms are folded into kernels and biases first (--no-fold leaves them). The file takes float32
images (batch, height, width, channels), normalized by mean and deviation of the training images as in training, and
gives logits. Both, how images are cut, and the names of the classes stand in FILE.json beside it. docs/export.md has
programs that run it."""

import argparse
from pathlib import Path
from typing import Any

from mimicnorm_jax import interop
from mimicnorm_jax.cli.command import run
from mimicnorm_jax.data.streaming.decoding import EVAL_SHARE
from mimicnorm_jax.interop.exporting import FORMATS, require_file
from mimicnorm_jax.training.dataset import is_streamed
from mimicnorm_jax.training.restore import Restored, read_checkpoint
from mimicnorm_jax.training.spec import make_model
from mimicnorm_jax.utils.files import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="mimicnorm export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a run of mimicnorm train")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="default: latest")
    parser.add_argument("--format", choices=FORMATS, default="stablehlo", help="default: stablehlo")
    parser.add_argument("--out", type=Path, help="the file to write; default: MODEL.FORMAT in --workdir")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument(
        "--vjp_order", type=int, default=0, help="how often it can be differentiated by the images (default: 0)"
    )
    arguments = parser.parse_args(argv)
    return run(lambda: _export(arguments), "interrupted; nothing was written")


def _export(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        require_file(arguments.out)
    found = read_checkpoint(arguments.workdir, arguments.checkpoint)
    path = arguments.out or arguments.workdir / f"{found.config.model}.{arguments.format}"
    require_file(path)
    model, variables, image_shape = make_model(found.config, found.dataset), found.variables, found.dataset.image_shape
    size = interop.packed_size(model, image_shape)
    if arguments.fold:
        model, variables = interop.fold(model, variables, image_shape=image_shape)
    options = {"image_shape": image_shape, "format": arguments.format, "vjp_order": arguments.vjp_order}
    interop.export(model, variables, path, **options)
    about = path.with_name(f"{path.name}.json")
    write_json(about, _about(found))
    print(f"{path}: {path.stat().st_size:,} bytes, {found.name}, images {image_shape}, see {about}")
    if size.binary_weights:
        print(
            f"{size.binary_weights:,} binary weights, floats in this file: the network takes {size.packed_bytes:,} "
            f"bytes where each is a bit, and {size.stored_bytes:,} as it was trained"
        )
    return 0


def _about(found: Restored) -> dict[str, Any]:
    """What a program that runs the file has to know."""
    config, side = found.config, found.dataset.image_shape[0]
    cut = (
        f"turned by EXIF; unless it is {side} x {side}, the middle square of {EVAL_SHARE} of the shorter side, "
        f"resampled to {side} x {side} bilinearly with antialiasing"
    )
    return {
        "image": cut if is_streamed(config, found.dataset) else "as the data set has it",
        "input": "float32 (pixel / 255 - mean) / std, by channel",
        "mean": config.mean or "of the training images",
        "std": config.std or "of the training images",
        "output": "logits, in the order of classes",
        "classes": found.dataset.classes,
    }
