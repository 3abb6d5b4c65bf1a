"""The variables of another run's checkpoint: for whoever evaluates them, and to start a run from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.data import DatasetSpec
from mimicnorm_jax.errors import ConfigError, DataError, WorkdirError
from mimicnorm_jax.training import data_record, workdir
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.resilience import CheckpointReader
from mimicnorm_jax.training.spec import OWN_METHOD, RunSpec, build_spec
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.utils.trees import path_names


@dataclass(frozen=True)
class Restored:
    """What a checkpoint of a run holds.

    Attributes:
      config: of the run, with mean and deviation as it measured them.
      dataset: of the run; described by the run's folder where it is gone.
      variables: as the run evaluates them.
      name: for a reader.
    """

    config: TrainConfig
    dataset: DatasetSpec
    variables: Any
    name: str


def read_checkpoint(folder: Path, which: str, data_dir: str = "", model: Any = None) -> Restored:
    """What a checkpoint of a run holds; reads no data.

    Args:
      folder: the run's.
      which: `latest` or `best`.
      data_dir: if the dataset has moved since.
      model: the run's network, if it had one of its own.

    Raises:
      WorkdirError: if there is no such checkpoint or it cannot be restored, or labels have another meaning now.
      ConfigError: if the run had a network of its own and none is given.
      DataError: if nothing is known any more of the run's dataset, as of one that is gone since a run that did not
        record it.
    """
    config = workdir.read_config(folder)
    config = replace(config, data_dir=data_dir or config.data_dir)
    if not (folder / "checkpoints").is_dir():
        raise WorkdirError(f"{folder} holds no checkpoint")
    # A checkpoint is that of its network, whatever devices share a batch here; no data is read for it.
    config, dataset = data_record.known(config, folder)
    spec = build_spec(config, num_devices=1, model=model, dataset=dataset)
    checkpoints = CheckpointReader(folder / "checkpoints")
    step = checkpoints.latest if which == "latest" else checkpoints.best
    if step is None:
        raise WorkdirError(f"{folder} holds no complete checkpoint")
    state, metadata = checkpoints.restore(step, spec.state_template())
    name = f"{config.model} under {config.method}, {which} checkpoint (epoch {metadata.epoch}) of {folder}"
    return Restored(config, dataset, state.eval_variables, name)


def require_start(config: TrainConfig) -> None:
    """Raises ConfigError if a config's `init_from` holds no run to start from."""
    if config.init_from and not (Path(config.init_from) / "checkpoints").is_dir():
        raise ConfigError(
            f"config.init_from is {config.init_from!r}, which holds no run with a checkpoint: train that one first, or "
            "name the --workdir in which it was trained"
        )


def start(spec: RunSpec) -> TrainState:
    """A run's state before its first step: fresh, or with the variables that `config.init_from` holds.

    Raises:
      ConfigError: if those are of another network.
      WorkdirError: as `read_checkpoint`.
    """
    config = spec.config
    if not config.init_from:
        return spec.init_state()
    source = Path(config.init_from)
    first = workdir.read_config(source)
    if first.method == OWN_METHOD != config.method:
        raise ConfigError(
            f"config.init_from is {config.init_from!r}, a run of {first.model}, a network of its own: give that one as "
            "this run's model, or name a run of a network of mimicnorm_jax.models"
        )
    data_dir = config.data_dir if first.dataset == config.dataset else ""
    own = spec.model if first.method == OWN_METHOD else None
    try:
        found = read_checkpoint(source, "best", data_dir, own)
    except DataError as error:
        raise ConfigError(
            f"config.init_from is {config.init_from!r}, of whose data set the shapes of its network come: {error}"
        ) from error
    template = spec.state_template()
    wanted = {"params": template.params, "batch_stats": template.batch_stats}
    given = {"params": found.variables["params"], "batch_stats": found.variables["batch_stats"]}
    differing = sorted(_shapes(wanted).items() ^ _shapes(given).items())
    if differing:
        path = differing[0][0]
        there, here = (_shapes(variables).get(path, "missing") for variables in (given, wanted))
        raise ConfigError(
            f"config.init_from is {config.init_from!r}, {found.name}: there {path} is {there}, and under config.model="
            f"{config.model!r}, config.method={config.method!r} it is {here}"
        )
    return spec.first_state(*(jax.tree.map(jnp.asarray, given[part]) for part in ("params", "batch_stats")))


def _shapes(variables: Any) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(variables)
    return {"/".join(path_names(path)): str(leaf.shape) for path, leaf in leaves}
