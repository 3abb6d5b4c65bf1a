"""Trains an image classifier, with MimicNorm or a method it is compared with.

  python train.py
  python train.py --config=configs/cifar100.py:resnet18,mimicnorm --config.batch_size=128 --workdir=DIR
  python train.py --eval_only --workdir=DIR

The same command on the same workdir goes on where the run stopped. Exit code: 0 when done, 2 for bad
input, 3 when the loss is not finite, 4 when another process of the run ended, 130 after Ctrl-C and 143 after
SIGTERM, both with a checkpoint of the step reached; a second signal stops at once.

On several hosts start the same command on each: with --distributed where TPU pods, SLURM or Open MPI start
it, else with --coordinator=HOST:PORT --processes=N --process_id=I. The first one writes the workdir."""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mimicnorm_jax.errors import ConfigError, NonFiniteLossError, PeerError, UserError, unknown
from mimicnorm_jax.training import config as config_lib

_DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "digits.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"FILE[:MODEL[,METHOD]], a file of configs/ or your own; default: {_DEFAULT}."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/DATASET-MODEL-METHOD-seedSEED in the current folder."
)
_EVAL_ONLY = flags.DEFINE_bool(
    "eval_only", False, "Evaluate the checkpoints in --workdir, with the config saved there."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes, as the cluster's environment says.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of the first one.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)

__doc__ = f"{__doc__}\n\nFields of the config, with their defaults before the config file's:\n{config_lib.describe()}\n"


_several = False


def _parse(argv: Sequence[str]) -> list[str]:
    for field in (match[1] for match in map(re.compile(r"--?config\.(\w+)").match, argv) if match):
        if field not in config_lib.FIELDS:
            raise ConfigError(unknown("config field", field, config_lib.FIELDS))
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.to_dict()  # a file that could not be loaded says so when it is first used
    except flags.Error as error:
        raise UserError(f"{error} (see --help)") from error
    except OSError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return rest


def _connect() -> bool:
    """Joins the other processes of the run, if the flags speak of several; whether they do."""
    given = {"coordinator": _COORDINATOR.value, "processes": _PROCESSES.value, "process_id": _PROCESS_ID.value}
    if _DISTRIBUTED.value or any(value is not None for value in given.values()):
        if _EVAL_ONLY.value:
            raise UserError("--eval_only takes one process: leave out the flags of several")
        from mimicnorm_jax import distributed

        print(f"waiting at most {distributed.INIT_TIMEOUT_S} s for all processes of the run", flush=True)
        distributed.connect(**given)
        return True
    return False


def _train(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"do not know what to do with {' '.join(argv[1:])!r}. See --help")
    # Importing these takes seconds, which --help and a mistyped flag need not wait for.
    from mimicnorm_jax import monitoring
    from mimicnorm_jax.training import loop, workdir
    from mimicnorm_jax.training.resilience import preemption

    global _several
    _several = _connect()
    if _EVAL_ONLY.value:
        if _WORKDIR.value is None:
            raise UserError("--eval_only needs --workdir=DIR, the folder of the run to evaluate")
        folder = Path(_WORKDIR.value)
        config = workdir.read_config(folder)
        data_dir = _CONFIG.value.data_dir or config.data_dir
        loop.evaluate_checkpoints(dataclasses.replace(config, data_dir=data_dir), folder)
    else:
        config = config_lib.validate(_CONFIG.value)
        default = f"runs/{config.dataset}-{config.model}-{config.method}-seed{config.seed}"
        try:
            loop.run(config, Path(_WORKDIR.value or default), monitoring.make_hook(config))
        except preemption.InterruptedRunError as error:
            print(error, file=sys.stderr)
            sys.exit(128 + error.signal)


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file; --verbosity=0 shows it
    if not any(argument.lstrip("-").split("=")[0] == "config" for argument in sys.argv):
        sys.argv.insert(1, f"--config={_DEFAULT}")
    try:
        app.run(_train, flags_parser=_parse)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        code = {NonFiniteLossError: 3, PeerError: 4}.get(type(error), 2)
        # Leaving as usual would wait minutes for processes that are gone, or that wait for this one.
        os._exit(code) if _several else sys.exit(code)
