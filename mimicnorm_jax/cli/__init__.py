"""The command line: `mimicnorm train|report|plan|diagnose|export|import-torch|prepare-data`."""

import importlib
import sys

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("trains an image classifier, or evaluates a run", "--config=configs/digits.py --workdir=RUN"),
    "report": ("compares runs on one HTML page", "RUN OTHER --out report.html"),
    "plan": (
        "what a run takes on a GPU or TPU, planned by its compiler",
        "--config=configs/cifar100.py:resnet18 --target=h100",
    ),
    "diagnose": ("tangent kernels, Jacobians, theory of wide networks", "ntk --model=resnet8 --images=16"),
    "export": ("a run's network in one StableHLO or ONNX file", "--workdir=RUN --format=stablehlo"),
    "import-torch": (
        "a PyTorch state dict into variables of ours",
        "net.pth --model=resnet50_imagenet --out=net.npz",
    ),
    "prepare-data": ("downloads and prepares a data set once", "cifar100 --data_dir=DIR"),
}
"""Every command, with what it does and an example; each is `main(argv)` of the module of its name."""
USAGE = """usage: mimicnorm COMMAND ...

{commands}

Without a config, `mimicnorm train` takes half a minute on a CPU.
`mimicnorm COMMAND --help` says more of each."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    usage = USAGE.format(
        commands="\n".join(
            f"  {name:14}{summary}\n    mimicnorm {name} {example}" for name, (summary, example) in COMMANDS.items()
        )
    )
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n{usage}", file=sys.stderr)
        return 2
    return importlib.import_module(f"mimicnorm_jax.cli.{name.replace('-', '_')}").main(rest)
