"""Trains an image classifier, with MimicNorm or a method it is compared with.

  python train.py
  python train.py --config=configs/cifar100.py:resnet18,mimicnorm --config.batch_size=128 --workdir=DIR
  python train.py --eval_only --workdir=DIR

The same command on the same workdir goes on where the run stopped. Exit code: 0 when done, 2 for bad
input, 3 when the loss is not finite."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mimicnorm_jax.errors import NonFiniteLossError, UserError
from mimicnorm_jax.training import config as config_lib

_DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits.py")
_CONFIG = config_flags.DEFINE_config_file("config", _DEFAULT, "FILE[:MODEL[,METHOD]], a file of configs/ or your own.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/DATASET-MODEL-METHOD-seedSEED in the current folder."
)
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the checkpoints in --workdir, with the config saved there.")

__doc__ += f"\n\nFields of the config, with their defaults before the config file's:\n{config_lib.describe()}\n"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"do not know what to do with {' '.join(argv[1:])!r}; see --help")
    # Importing these takes seconds, which --help and a mistyped flag need not wait for.
    from mimicnorm_jax.training import loop, workdir

    if _EVAL_ONLY.value:
        if _WORKDIR.value is None:
            raise UserError("--eval_only needs --workdir=DIR, the folder of the run to evaluate")
        folder = Path(_WORKDIR.value)
        config = workdir.read_config(folder)
        config.data_dir = _CONFIG.value.data_dir or config.data_dir
        loop.evaluate_checkpoints(config, folder)
    else:
        config = _CONFIG.value
        default = f"runs/{config.dataset}-{config.model}-{config.method}-seed{config.seed}"
        loop.run(config, Path(_WORKDIR.value or default))


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file; --verbosity=0 shows it
    try:
        app.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteLossError) else 2)
