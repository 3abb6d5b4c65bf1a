"""Checkpoints: orbax underneath, a digest and the tree's description beside every state."""

import itertools
import shutil
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mimicnorm_jax.errors import DamagedCheckpointError
from mimicnorm_jax.training.resilience.checkpoint_reader import (
    REPLACED,
    CheckpointMetadata,
    alone,
    checksum,
    damaged,
    describe,
    description,
    digest,
    read_checkpoint_folder,
    selection_score,
)
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.utils.console import log_line


class Checkpoints:
    """The checkpoints that a run writes into a folder: the newest `keep` and the most accurate one. A context manager.

    Others than the run that holds the folder's lock read with `CheckpointReader`.

    Saves copy the state to the host first, so that the next step may overwrite its buffers, and
    write in the background; a folder appears under its final name only when it is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Opens or creates the folder; removes what saves of a killed run left half-written.

        What cannot be a whole checkpoint is renamed to `damaged-STEP-N`.

        Raises:
          DamagedCheckpointError: if it cannot read what is there.
        """
        self._folder = folder.absolute()
        for path in self._folder.glob(f"{REPLACED}*"):
            self._drop_replaced(int(path.name.removeprefix(REPLACED)))
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)
        for path in sorted(self._folder.glob("*")):
            # Orbax reads the metrics of all checkpoints and would give up on the first damaged one.
            if not path.name.isdigit():
                continue
            try:
                description(path)
            except ValueError as error:
                self._quarantine(DamagedCheckpointError(damaged("the checkpoint", path, error)), path)

        def accuracy(metrics: Any) -> float:
            return metrics["accuracy"]

        options = ocp.CheckpointManagerOptions(
            best_fn=accuracy,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=accuracy, n=1)]),
            multiprocessing_options=alone(),
            create=False,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:  # it reads every checkpoint's metrics, and raises whatever it likes
            raise DamagedCheckpointError(damaged("one of the checkpoints in", self._folder, error)) from error

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
            (self._folder / str(step)).rename(self._folder / f"{REPLACED}{step}")
            self._manager.reload()
        saved = {
            "epoch": metadata.epoch,
            "accuracy": metadata.accuracy,
            "partial": metadata.partial,
            "skipped": metadata.skipped,
            "seconds": metadata.seconds,
            "consecutive": metadata.consecutive,
            "images": metadata.images,
            "tree": describe(leaves),
            "digest": digest(leaves),
        }
        saved["checksum"] = checksum(saved)
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), metadata=ocp.args.JsonSave(saved)),
            metrics={"accuracy": selection_score(metadata.accuracy)},
        )
        if replaces:
            self._manager.wait_until_finished()
            self._drop_replaced(step)

    def _drop_replaced(self, step: int) -> None:
        """Removes a checkpoint that another has replaced, or puts it back."""
        replaced, place = self._folder / f"{REPLACED}{step}", self._folder / str(step)
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
        self._manager.wait_until_finished()
        return read_checkpoint_folder(self._folder / str(step), template)

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


def _leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Copies on the host, by path; views would change when the state's buffers are donated."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in paths}
