"""Plans of runs for a reader: a table, and bars of what lives at the peak and of what kernels move."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimicnorm_jax import plots
from mimicnorm_jax.errors import DoesNotFitError
from mimicnorm_jax.training.plan import TrainingPlan

MIB = 2**20
ROLES = {
    "forward": "kept from the forward pass",
    "recomputed": "recomputed",
    "backward": "of the backward pass",
    "copy": "copies of arguments",
    "unnamed": "made by the compiler",
}


@dataclass(frozen=True)
class Row:
    """One run on one target.

    Attributes:
      target: its name.
      method: of the run.
      label: what tells the row from others of its target.
      plan: of the run; the compiler's refusal if it did not fit a TPU.
      largest_batch: None if it was not asked for.
    """

    target: str
    method: str
    label: str
    plan: TrainingPlan | DoesNotFitError
    largest_batch: int | None = None

    @property
    def fits(self) -> bool:
        return isinstance(self.plan, TrainingPlan) and self.plan.fits

    def cells(self, reference: TrainingPlan | None) -> list[str]:
        """What the table says; ratios to a reference."""
        batch = "" if self.largest_batch is None else f"{self.largest_batch:,}"
        if isinstance(self.plan, DoesNotFitError):
            needed = self.plan.needed
            return [self.target, self.label, "does not fit" if needed is None else f"{_mib(needed)}!", *[""] * 6, batch]
        step = self.plan.step
        base = reference and reference.step
        carried = step.fused
        return [
            self.target,
            self.label,
            _mib(self.plan.peak_bytes) + ("" if self.plan.fits else "!"),
            _mib(step.temporary_bytes) + _ratio(step.temporary_bytes, base and base.temporary_bytes),
            _mib(step.argument_bytes),
            f"{step.flops / 1e9:,.0f}" + _ratio(step.flops, base and base.flops),
            f"{step.total_moved / 1e9:,.2f}" + _ratio(step.total_moved, base and base.total_moved),
            "" if step.bound_seconds is None else f"{1e3 * step.bound_seconds:,.2f} ({step.bound_by})",
            f"{carried['activation']}/{carried['residual']}/{carried['forward']}" if carried["forward"] else "",
            batch,
        ]


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f}"


def _ratio(value: float, reference: float | None) -> str:
    return f" ({value / reference:.3f})" if reference else ""


HEAD = (
    "target", "run", "peak MiB", "temporaries MiB", "arguments MiB", "GFLOP", "GB moved", "bound ms", "fused",
    "largest batch",
)  # fmt: skip
LEGEND = """\
Planned by the compiler, for one device; nothing was run. In brackets: ratio to the target's first run. Peak: the step
and the dataset, which waits on the device unless it is streamed; ! does not fit. GFLOP: of convolutions and products,
what is done again included. GB moved: what kernels read and write. Bound: a step cannot take less time, by its
operations or bytes; it is no prediction. Fused: forward convolutions that apply an activation / add a residual in their
kernel / all (CUDA). Largest batch: of those that are no larger than the training images."""


def references(rows: Sequence[Row]) -> dict[str, TrainingPlan]:
    """By target, the first run that was planned."""
    found: dict[str, TrainingPlan] = {}
    for row in rows:
        if isinstance(row.plan, TrainingPlan):
            found.setdefault(row.target, row.plan)
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned; columns that say nothing are left out."""
    first = references(rows)
    lines = [list(HEAD), *(row.cells(first.get(row.target)) for row in rows)]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.ljust(width) if i < 2 else cell.rjust(width) for cell in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def decoding(rows: Sequence[Row], rate: float) -> str:
    """How many cores that decode each run could use, were its steps as fast as their bound.

    Args:
      rows: of streamed runs.
      rate: images a second that a core decodes.
    """
    lines = [f"streamed images, of which a core of this machine decodes {rate:,.0f} a second (500 x 375 JPEG)"]
    for row in rows:
        if isinstance(row.plan, TrainingPlan) and (seconds := row.plan.step.bound_seconds):
            needed = row.plan.batch_size / seconds
            cores = f"which {needed / rate:,.1f} such cores decode"
            lines.append(f"  {row.target} {row.label}: at most {needed:,.0f} images/s, {cores}")
    return "\n".join(lines)


def alive(plan: TrainingPlan) -> dict[str, float]:
    """MiB on a device at the peak of a training step, by what they are."""
    roles = plan.step.live_by_role
    data = sum(b.nbytes for b in plan.step.live if b.role == "argument" and b.layer.startswith("data"))
    listed = sum(roles.values())
    found = {"dataset": data + plan.test_bytes + plan.ahead_bytes, "state": roles.get("argument", 0) - data}
    found |= {label: roles.get(role, 0) for role, label in ROLES.items()}
    found["gaps, results and constants"] = plan.step.peak_bytes - listed
    return {name: nbytes / MIB for name, nbytes in found.items()}


def _panels(rows: Sequence[Row], of: str) -> dict[str, dict[str, dict[str, float]]]:
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if isinstance(row.plan, TrainingPlan):
            moved = {name: nbytes / 1e9 for name, nbytes in row.plan.step.bytes_moved.items()}
            panels.setdefault(row.target, {})[row.label] = alive(row.plan) if of == "memory" else moved
    return panels


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Draws both figures into a folder and returns their paths; none if matplotlib is missing or nothing fits."""
    labels = {"memory": "alive at the peak (MiB)", "traffic": "read and written by kernels (GB)"}
    if not plots.available() or not references(rows):
        return []
    paths = []
    for name, label in labels.items():
        paths.append(folder / f"plan_{name}.png")
        plots.stacked_bars(_panels(rows, name), paths[-1], f"{title}, planned by the compiler", label)
    return paths


def draw_frontier(rows: Mapping[str, Sequence[TrainingPlan]], path: Path, title: str) -> None:
    """Draws bytes moved against temporaries, a line for each way to recompute along its numbers of microbatches."""
    series = {
        name: plots.Series(
            np.array([plan.step.temporary_bytes / MIB for plan in plans]),
            np.array([plan.step.total_moved / 1e9 for plan in plans]),
        )
        for name, plans in rows.items()
    }
    plots.lines(series, path, title, "temporaries (MiB)", "read and written by kernels (GB)", "log")
