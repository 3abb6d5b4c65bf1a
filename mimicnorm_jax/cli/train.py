"""Trains an image classifier, with MimicNorm or a method it is compared with.

  mimicnorm train
  mimicnorm train --config=configs/cifar100.py:resnet18,mimicnorm --config.batch_size=128 --workdir=DIR
  mimicnorm train --eval_only --workdir=DIR

From a clone of the repository `python train.py` is the same. Rerunning with the same --workdir resumes bit-exactly.
Exit code: 0 when done, 2 for bad input, 3 when the loss is not finite, 4 when another process of the run ended (134
where JAX notices it first), 130 after Ctrl-C and 143 after SIGTERM, both with a checkpoint of the step reached; a
second signal stops at once.

On several hosts start the same command on each: with --distributed where TPU pods, SLURM or Open MPI start
it, else with --coordinator=HOST:PORT --processes=N --process_id=I. Process 0 writes the workdir and logs."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mimicnorm_jax import distributed, monitoring
from mimicnorm_jax.cli import command
from mimicnorm_jax.errors import ConfigError, UserError
from mimicnorm_jax.training import TrainConfig, evaluate_checkpoints, loop, workdir
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; default: runs/DATASET-MODEL-METHOD-seedSEED in the current folder.",
        values,
    )
    flags.DEFINE_bool("eval_only", False, "Evaluate the checkpoints in --workdir, with the config saved there.", values)
    flags.DEFINE_bool("distributed", False, "Several processes, as the cluster's environment says.", values)
    flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of the first one.", values)
    flags.DEFINE_integer("processes", None, "How many there are.", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0, flag_values=values)


def _connect(values: Any) -> None:
    """Joins the other processes of the run, if the flags speak of several."""
    given = {"coordinator": values.coordinator, "processes": values.processes, "process_id": values.process_id}
    if values.distributed or any(value is not None for value in given.values()):
        if values.eval_only:
            raise UserError("--eval_only takes one process: leave out the flags of several")
        print(f"waiting at most {distributed.INIT_TIMEOUT_S} s for all processes of the run", flush=True)
        distributed.connect(**given)


def _to_evaluate(saved: TrainConfig, given: Any, fields: Iterable[str]) -> TrainConfig:
    """The config of a run to evaluate, with the fields of the command line that change no numbers.

    Raises:
      ConfigError: for another field that the run has another value of.
    """
    for field in fields:
        here, there = (tuple(v) if isinstance(v, list) else v for v in (given[field], getattr(saved, field)))
        if field not in workdir.MUTABLE_ON_RESUME and here != there:
            raise ConfigError(
                f"config.{field} is {here!r} here and {there!r} in the run: --eval_only evaluates the run as it was "
                "trained. Leave the field out"
            )
    changed = {field: given[field] for field in fields if field in workdir.MUTABLE_ON_RESUME}
    return config_lib.validate(config_lib.base(**dataclasses.asdict(saved) | changed))


def _train(argv: Sequence[str]) -> int:
    values: Any = command.parse(_define, __doc__ or "", argv, command.DEFAULT_CONFIG)
    if values is None:
        return 0
    _connect(values)
    if values.eval_only:
        if values.workdir is None:
            raise UserError("--eval_only needs --workdir=DIR, the folder of the run to evaluate")
        folder = Path(values.workdir)
        config = _to_evaluate(workdir.read_config(folder), values.config, command.given_fields(argv))
        evaluate_checkpoints(config, folder)
        return 0
    config = config_lib.validate(values.config)
    folder = values.workdir or f"runs/{config.dataset}-{config.model}-{config.method}-seed{config.seed}"
    try:
        loop.run(config, Path(folder), make_hook=monitoring.make_hook(config))
    except InterruptedRunError as error:
        print(error, file=sys.stderr)
        return 128 + error.signal
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return command.run(lambda: _train(arguments), "interrupted: the same command resumes from the newest checkpoint")
