"""The command line: `mimicnorm train|plan|diagnose|prepare-data`."""

import importlib
import sys

COMMANDS: dict[str, str] = {
    "train": "train an image classifier, or evaluate a run",
    "plan": "what a run will take on a GPU or TPU, planned by the device's compiler",
    "diagnose": "tangent kernels, Jacobians and the theory of wide networks",
    "prepare-data": "download and prepare a dataset of TFDS once",
}
"""Every command, with what it does."""


def main() -> None:
    """Runs the command that the first argument names, and ends the process with its exit code."""
    usage = "usage: mimicnorm COMMAND ... (mimicnorm COMMAND --help says more)\n\n" + "\n".join(
        f"  {name:14}{summary}" for name, summary in COMMANDS.items()
    )
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n{usage}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"mimicnorm {name}"]
    # Only the one that runs: each defines command-line flags of its own.
    sys.exit(importlib.import_module(f"mimicnorm_jax.cli.{name.replace('-', '_')}").main())
