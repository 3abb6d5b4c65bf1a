"""Checkpoints: orbax underneath, a digest and the tree's description beside every state."""

import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mimicnorm_jax.errors import DamagedCheckpointError, WorkdirError
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.utils.console import log_line

_REPLACED = "replaced-"


@dataclass(frozen=True)
class CheckpointMetadata:
    """What stands beside a state.

    Attributes:
      epoch: epochs done.
      accuracy: on the test images, in [0, 1]; None in the middle of an epoch.
      partial: training metrics of the epoch begun, as `Metrics`' sums.
      skipped: steps of the run that were left out, see `NonFiniteMonitor`.
      seconds: that the epoch begun has taken.
    """

    epoch: int
    accuracy: float | None
    partial: tuple[float, float, float] = (0.0, 0.0, 0.0)
    skipped: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints in a folder: the newest `keep` and the most accurate one. A context manager.

    Saves copy the state to the host first, so that the next step may overwrite its buffers, and
    write in the background; a folder appears under its final name only when it is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Opens or creates the folder; renames to `damaged-STEP-N` what cannot be a whole checkpoint.

        Raises:
          DamagedCheckpointError: if it cannot read what is there.
        """
        self._folder = folder.absolute()
        for path in self._folder.glob(f"{_REPLACED}*"):
            self._drop_replaced(int(path.name.removeprefix(_REPLACED)))
        for path in sorted(self._folder.glob("*")):
            # Orbax reads the metrics of all checkpoints and would give up on the first damaged one.
            if path.name.isdigit() and (reason := _damage(path)):
                self._quarantine(DamagedCheckpointError(_damaged("the checkpoint", path, reason)), path)

        def accuracy(metrics: Any) -> float:
            return metrics["accuracy"]

        options = ocp.CheckpointManagerOptions(
            best_fn=accuracy,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=accuracy, n=1)]),
            # The process that opens checkpoints does not wait for others, which open none.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
            create=False,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:  # it reads every checkpoint's metrics, and raises whatever it likes
            raise DamagedCheckpointError(_damaged("one of the checkpoints in", self._folder, error)) from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the most accurate checkpoint, None if there is none."""
        return self._manager.best_step()

    def save(self, state: TrainState, metadata: CheckpointMetadata) -> None:
        """Saves a state under its step, in the background; at once where there is one of that step.

        That one, of an epoch that was not evaluated, is there until the new one is whole.

        Args:
          state: of a run, on the host or replicated.
          metadata: what stands beside it.
        """
        leaves = _leaves(state)
        step = int(leaves[".step"])
        if replaces := step == self.latest:
            self._manager.wait_until_finished()
            (self._folder / str(step)).rename(self._folder / f"{_REPLACED}{step}")
            self._manager.reload()
        saved = {
            "epoch": metadata.epoch,
            "accuracy": metadata.accuracy,
            "partial": metadata.partial,
            "skipped": metadata.skipped,
            "seconds": metadata.seconds,
            "tree": _describe(leaves),
            "digest": _digest(leaves),
        }
        saved["checksum"] = _checksum(saved)
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), metadata=ocp.args.JsonSave(saved)),
            metrics={"accuracy": _selection_score(metadata.accuracy)},
        )
        if replaces:
            self._manager.wait_until_finished()
            self._drop_replaced(step)

    def _drop_replaced(self, step: int) -> None:
        """Removes a checkpoint that another has replaced, or puts it back."""
        replaced, place = self._folder / f"{_REPLACED}{step}", self._folder / str(step)
        if place.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(place)

    def restore(self, step: int, template: TrainState) -> tuple[TrainState, CheckpointMetadata]:
        """Reads a checkpoint back, bit for bit.

        Args:
          step: of the checkpoint.
          template: a state of the same network and optimizer, or its shapes from `jax.eval_shape`.

        Returns:
          The state, with numpy leaves, and its metadata.

        Raises:
          WorkdirError: if the checkpoint is damaged or belongs to another network or optimizer.
        """
        folder = self._folder / str(step)
        wanted = _empty_leaves(template)
        try:
            saved = self._description(step)
            later = saved.get("skipped", 0), saved.get("seconds", 0.0)  # which older checkpoints lack
            metadata = CheckpointMetadata(saved["epoch"], saved["accuracy"], tuple(saved["partial"]), *later)
        except Exception as error:  # orbax raises bare Exceptions on damaged files
            raise DamagedCheckpointError(_damaged("the checkpoint", folder, error)) from error
        if difference := _difference(saved["tree"], _describe(wanted)):
            raise WorkdirError(
                f"the checkpoint {folder} belongs to another network or optimizer: {difference}. Choose another "
                f"--workdir, or the config that it was made with"
            )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
            leaves = restored["state"]
        except Exception as error:
            raise DamagedCheckpointError(_damaged("the checkpoint", folder, error)) from error
        if _digest(leaves) != saved["digest"]:
            raise DamagedCheckpointError(_damaged("the checkpoint", folder, "its digest does not match its contents"))
        return jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in wanted]), metadata

    def _description(self, step: int) -> dict[str, Any]:
        """What stands beside a state, by `save`."""
        arguments = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        saved: Any = self._manager.restore(step, args=arguments)["metadata"]
        if saved["checksum"] != _checksum(saved):
            raise ValueError("its description does not match its checksum")
        return saved

    def restore_newest(self, template: TrainState) -> tuple[TrainState, CheckpointMetadata] | None:
        """Reads the newest checkpoint that is whole; damaged ones are quarantined as `damaged-STEP-N`, with a warning.

        Args:
          template: a state of the same network and optimizer, or its shapes from `jax.eval_shape`.

        Returns:
          The state, with numpy leaves, and its metadata; None if there never was a checkpoint.

        Raises:
          WorkdirError: if none is whole, or the newest whole one belongs to another network or optimizer.
        """
        while self.latest is not None:
            step = self.latest
            try:
                return self.restore(step, template)
            except DamagedCheckpointError as error:
                self._quarantine(error, self._folder / str(step))
                self._manager.reload()
        if damaged := sorted(path.name for path in self._folder.glob("damaged-*")):
            raise DamagedCheckpointError(
                f"no checkpoint in {self._folder} is whole ({', '.join(damaged)}). Restore one from a copy under its "
                f"step's number, or choose another --workdir to start afresh"
            )
        return None

    def _quarantine(self, error: DamagedCheckpointError, path: Path) -> None:
        names = (f"damaged-{path.name}-{n}" for n in itertools.count(1))
        quarantined = next(folder for folder in map(self._folder.joinpath, names) if not folder.exists())
        log_line(f"warning: {error}. It is renamed to {quarantined.name}; the checkpoint before it takes its place")
        path.rename(quarantined)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _selection_score(accuracy: float | None) -> float:
    """What decides which checkpoint is the best; never one in the middle of an epoch."""
    return -1.0 if accuracy is None else accuracy


def _checksum(saved: dict[str, Any]) -> str:
    content = {name: value for name, value in saved.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damage(folder: Path) -> str:
    """Why the small files of a checkpoint cannot be those that were saved; empty if they can."""
    try:
        saved = json.loads((folder / "metadata" / "metadata").read_text())
        if saved["checksum"] != _checksum(saved):
            return "its description does not match its checksum"
        if json.loads((folder / "metrics" / "metrics").read_text())["accuracy"] != _selection_score(saved["accuracy"]):
            return "its accuracy is not the one that was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its description cannot be read ({type(error).__name__}: {error})"
    return ""


def _damaged(which: str, folder: Path, reason: object) -> str:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return f"{which} {folder} is damaged: {text[:200]}"


def _leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Copies on the host, by path; views would change when the state's buffers are donated."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in paths}


def _empty_leaves(template: TrainState) -> dict[str, np.ndarray]:
    """Arrays of the template's shapes by path, so that what is restored comes as numpy's and not onto a device."""
    paths, _ = jax.tree_util.tree_flatten_with_path(template)
    return {jax.tree_util.keystr(path): np.empty(leaf.shape, leaf.dtype) for path, leaf in paths}


def _describe(leaves: dict[str, np.ndarray]) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _digest(leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf = np.asarray(leaves[path])
        digest.update(f"{path} {leaf.dtype}{list(leaf.shape)}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _difference(there: dict[str, str], here: dict[str, str]) -> str:
    for path in [*here, *there]:
        if there.get(path) != here.get(path):
            return f"{path} is {there.get(path, 'missing')} there and {here.get(path, 'missing')} here"
    return ""
