"""Turns a PyTorch state dict of a network of the paper's code, or of torchvision, into variables, in one .npz file.

mimicnorm import-torch FILE --model=resnet50_imagenet --method=batchnorm --num_classes=1000 --out=resnet50.npz

FILE is .pth, .pt, .bin or .tar (which needs PyTorch, and is refused where it holds more than tensors), .npz or
.safetensors. `mimicnorm_jax.interop.read_variables` reads what is written. Which networks have which names under which
method: docs/interop.md."""

import argparse

import jax
import numpy as np

from mimicnorm_jax import interop, models
from mimicnorm_jax.cli.command import run
from mimicnorm_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="mimicnorm import-torch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the state dict")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(models.ARCHITECTURES)}")
    parser.add_argument("--method", default="mimicnorm", help="default: mimicnorm; or batchnorm, none, fixup, ...")
    parser.add_argument("--num_classes", type=int, default=100, help="default: 100")
    parser.add_argument("--out", required=True, help="the .npz file to write")
    arguments = parser.parse_args(argv)
    return run(lambda: _import(arguments), "interrupted; nothing was written")


def _import(arguments: argparse.Namespace) -> int:
    try:
        model = models.create(arguments.model, method=arguments.method, num_classes=arguments.num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    variables = interop.torch.load(arguments.file, model)
    interop.write_variables(arguments.out, variables)
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(variables["params"]))
    print(f"{arguments.out}: {arguments.model} under {arguments.method}, {count:,} parameters")
    return 0
