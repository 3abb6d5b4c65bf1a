"""What the checkpoints of a run hold, for whoever changes nothing of them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mimicnorm_jax.errors import DamagedCheckpointError, WorkdirError
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.utils.console import log_line

REPLACED = "replaced-"
"""Before the step of a checkpoint that is about to be replaced."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """What stands beside a state.

    Attributes:
      epoch: epochs done.
      accuracy: on the test images, in [0, 1]; None in the middle of an epoch.
      partial: training metrics of the epoch begun, as `Metrics`' sums.
      skipped: steps of the run that were left out, see `NonFiniteMonitor`.
      seconds: that the epoch begun has taken.
      consecutive: of the skipped steps, the last ones in a row.
      images: how many there are to train on and to test with, which the order of images depends on; 0 in checkpoints of
        older versions.
    """

    epoch: int
    accuracy: float | None
    partial: tuple[float, float, float] = (0.0, 0.0, 0.0)
    skipped: int = 0
    seconds: float = 0.0
    consecutive: int = 0
    images: tuple[int, int] = (0, 0)


def alone() -> ocp.options.MultiprocessingOptions:
    """The process that opens checkpoints does not wait for others, which open none."""
    return ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def read_checkpoint_folder(folder: Path, template: TrainState) -> tuple[TrainState, CheckpointMetadata]:
    """Reads a checkpoint back, bit for bit.

    Args:
      folder: of the checkpoint.
      template: a state of the same network and optimizer, or its shapes from `jax.eval_shape`.

    Returns:
      The state, with numpy leaves, and its metadata.

    Raises:
      WorkdirError: if the checkpoint is damaged or belongs to another network or optimizer.
    """
    wanted = _empty_leaves(template)
    try:
        saved = description(folder)
        later = {name: saved[name] for name in ("skipped", "seconds", "consecutive") if name in saved}
        images = tuple(saved.get("images", (0, 0)))  # which older checkpoints lack
        metadata = CheckpointMetadata(
            saved["epoch"], saved["accuracy"], tuple(saved["partial"]), images=images, **later
        )
    except ValueError as error:
        raise DamagedCheckpointError(damaged("the checkpoint", folder, error)) from error
    if difference := _difference(saved["tree"], describe(wanted)):
        raise WorkdirError(
            f"the checkpoint {folder} belongs to another network or optimizer: {difference}. Choose another "
            f"--workdir, or the config that it was made with"
        )
    try:
        with ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone()), multiprocessing_options=alone()
        ) as checkpointer:
            leaves = checkpointer.restore(folder / "state", args=ocp.args.StandardRestore(wanted))
    except Exception as error:  # orbax raises bare Exceptions on damaged files
        raise DamagedCheckpointError(damaged("the checkpoint", folder, error)) from error
    if digest(leaves) != saved["digest"]:
        raise DamagedCheckpointError(damaged("the checkpoint", folder, "its digest does not match its contents"))
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in wanted]), metadata


class CheckpointReader:
    """The checkpoints in a folder, which a run may be writing: none is renamed or removed.

    Those that cannot be whole are left out with a warning. One that the run is about to replace counts.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the checkpoints of a folder."""
        folder = folder.absolute()
        self._places = {int(path.name.removeprefix(REPLACED)): path for path in folder.glob(f"{REPLACED}*")}
        self._places |= {int(path.name): path for path in folder.glob("*") if path.name.isdigit()}
        self._scores: dict[int, float] = {}
        for step, path in sorted(self._places.items()):
            try:
                self._scores[step] = selection_score(description(path)["accuracy"])
            except ValueError as error:
                log_line(f"warning: {damaged('the checkpoint', path, error)}. It is left out")

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return max(self._scores, default=None)

    @property
    def best(self) -> int | None:
        """Step of the most accurate checkpoint, None if there is none."""
        return max(self._scores, key=lambda step: (self._scores[step], step), default=None)

    def restore(self, step: int, template: TrainState) -> tuple[TrainState, CheckpointMetadata]:
        """Reads a checkpoint back; arguments and result of `Checkpoints.restore`.

        Args:
          step: of the checkpoint.
          template: a state of the same network and optimizer, or its shapes.

        Raises:
          WorkdirError: as there, or if the run has removed the checkpoint meanwhile.
        """
        place = self._places[step]
        try:
            return read_checkpoint_folder(place, template)
        except DamagedCheckpointError as error:
            if place.exists():
                raise
            raise WorkdirError(
                f"the checkpoint {place} was removed while it was read, by a run that goes on: repeat the command"
            ) from error


def selection_score(accuracy: float | None) -> float:
    """What decides which checkpoint is the best; never one in the middle of an epoch."""
    return -1.0 if accuracy is None else accuracy


def checksum(saved: dict[str, Any]) -> str:
    """Of what stands beside a state, but for itself."""
    content = {name: value for name, value in saved.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def description(folder: Path) -> dict[str, Any]:
    """What stands beside the state of a checkpoint, by `Checkpoints.save`.

    Raises:
      ValueError: if it cannot be what was saved.
    """
    try:
        saved = json.loads((folder / "metadata" / "metadata").read_text())
        accuracy = json.loads((folder / "metrics" / "metrics").read_text())["accuracy"]
        if saved["checksum"] != checksum(saved):
            raise ValueError("its description does not match its checksum")
        if accuracy != selection_score(saved["accuracy"]):
            raise ValueError("its accuracy is not the one that was saved")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"its description cannot be read ({type(error).__name__}: {error})") from error
    return saved


def damaged(which: str, folder: Path, reason: object) -> str:
    """A message."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return f"{which} {folder} is damaged: {text[:200]}"


def _empty_leaves(template: TrainState) -> dict[str, np.ndarray]:
    """Arrays of the template's shapes by path, so that what is restored comes as numpy's and not onto a device."""
    paths, _ = jax.tree_util.tree_flatten_with_path(template)
    return {jax.tree_util.keystr(path): np.empty(leaf.shape, leaf.dtype) for path, leaf in paths}


def describe(leaves: dict[str, np.ndarray]) -> dict[str, str]:
    """Types and shapes."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def digest(leaves: dict[str, np.ndarray]) -> str:
    """Of names, types, shapes and values, whatever their order."""
    found = hashlib.sha256()
    for path in sorted(leaves):
        leaf = np.asarray(leaves[path])
        found.update(f"{path} {leaf.dtype}{list(leaf.shape)}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _difference(there: dict[str, str], here: dict[str, str]) -> str:
    for path in [*here, *there]:
        if there.get(path) != here.get(path):
            return f"{path} is {there.get(path, 'missing')} there and {here.get(path, 'missing')} here"
    return ""
