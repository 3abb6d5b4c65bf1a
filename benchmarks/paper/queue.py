"""Which run comes next, and keeping it from other processes."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks._results import Record
from benchmarks.paper import comparison
from benchmarks.paper.experiments import Arm, Comparison
from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import lock_workdir


def next_run(
    arms: Sequence[Arm],
    seeds: Sequence[int] | None,
    records: Sequence[Record],
    begun: Callable[[Arm, int], bool],
    remaining: float,
    elsewhere: Callable[[Arm, int], bool] = lambda arm, seed: False,
) -> tuple[Arm, int] | None:
    """What to run next, so that whole comparisons (the arms of a network with one seed) get done in time.

    Args:
      arms: of the experiment.
      seeds: of each arm; None: its own.
      records: of finished runs.
      begun: whether a run was stopped on its way.
      remaining: seconds.
      elsewhere: whether another process has a run.

    Returns:
      An arm and a seed: of a comparison that was begun, if there is one; else of the first that fits in the
      remaining time or may do so, by the time that this network's runs took; else of the first. None if all is done or
      under way elsewhere.
    """

    def done(arm: Arm, seed: int) -> bool:
        return any(comparison.belongs(record, arm, seed) for record in records)

    def rank(seed: int, members: list[Arm]) -> tuple[bool, bool]:
        open_runs = [arm for arm in members if not done(arm, seed)]
        started = len(open_runs) < len(members) or any(begun(arm, seed) for arm in members)
        took = [comparison.seconds(r) for r in records for arm in members if r["config"]["model"] == arm.net]
        too_long = bool(took) and len(open_runs) * sum(took) / len(took) > remaining
        return not started, too_long

    def free(arm: Arm, seed: int) -> bool:
        return not done(arm, seed) and not elsewhere(arm, seed)

    open_groups = [
        (seed, members) for seed, members in _comparisons(arms, seeds) if any(free(arm, seed) for arm in members)
    ]
    if not open_groups:
        return None
    seed, members = min(open_groups, key=lambda group: rank(*group))
    return min((arm for arm in members if free(arm, seed)), key=lambda arm: not begun(arm, seed)), seed


def _comparisons(arms: Sequence[Arm], seeds: Sequence[int] | None) -> list[tuple[int, list[Arm]]]:
    """Seed and arms of every comparison: by stage, then by seed, then as the arms come."""
    by_stage: dict[int, dict[tuple[int, Comparison], list[Arm]]] = {}
    for stage in sorted({arm.stage for arm in arms}):
        of_stage = [arm for arm in arms if arm.stage == stage]
        for seed in dict.fromkeys(seeds if seeds is not None else sorted({s for arm in of_stage for s in arm.seeds})):
            for arm in of_stage:
                if seeds is not None or seed in arm.seeds:
                    by_stage.setdefault(stage, {}).setdefault((seed, arm.comparison), []).append(arm)
    return [(seed, members) for groups in by_stage.values() for (seed, _), members in groups.items()]


def claim(folder: Path) -> contextlib.ExitStack | None:
    """Keeps a run to this process until the stack is closed or the process ends; None if another living one has it.

    Beside the folder, since train.py locks the folder itself, and outlives a process that is killed.

    Raises:
      WorkdirError: if it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_workdir(folder.parent / "claimed" / folder.name))
            if folder.exists():
                with lock_workdir(folder):
                    pass
        except WorkdirError as error:
            if isinstance(error.__cause__, BlockingIOError):
                return None
            raise
        return stack.pop_all()
