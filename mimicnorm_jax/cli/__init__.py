"""The command line: `mimicnorm train|plan|diagnose|import-torch|prepare-data`."""

import importlib
import sys

COMMANDS: dict[str, str] = {
    "train": "train an image classifier, or evaluate a run",
    "plan": "what a run will take on a GPU or TPU, planned by the device's compiler",
    "diagnose": "tangent kernels, Jacobians and the theory of wide networks",
    "import-torch": "a PyTorch state dict of the paper's code or torchvision into variables of ours",
    "prepare-data": "download and prepare a dataset of TFDS once",
}
"""Every command, with what it does; each is `main(argv)` of the module of its name."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    usage = "usage: mimicnorm COMMAND ... (mimicnorm COMMAND --help says more)\n\n" + "\n".join(
        f"  {name:14}{summary}" for name, summary in COMMANDS.items()
    )
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n{usage}", file=sys.stderr)
        return 2
    return importlib.import_module(f"mimicnorm_jax.cli.{name.replace('-', '_')}").main(rest)
