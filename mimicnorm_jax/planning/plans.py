"""What a compiled program takes, as a record that can be written down and read again."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mimicnorm_jax.errors import PlanError
from mimicnorm_jax.planning.liveness import Buffer
from mimicnorm_jax.planning.traffic import Convolution

FORMAT = 4
"""Of the JSON; raised whenever something else is counted, so that older plans are made again."""


@dataclass(frozen=True)
class Plan:
    """What a program takes on one device of its target, as the compiler planned it; nothing was run.

    Attributes:
      target: that it was compiled for.
      devices: that share the program; all figures are for one of them.
      argument_bytes, output_bytes: of its arguments and results.
      aliased_bytes: of results that take the place of donated arguments.
      temporary_bytes: besides both, while it runs.
      constant_bytes: of arrays that the program holds, such as what the function closes over; 0 where the compiler
        wrote no buffer assignment.
      peak_bytes: arguments, results that replace no argument, temporaries and constants.
      usable_bytes: what one program can have on the device, see `Target.usable`; None for a CPU.
      flops: of convolutions and matrix products, those that are done again counted again; padding does not count.
      bytes_moved: bytes that kernels read from and write to the device's memory, by one of `traffic.CLASSES`; each
        kernel reads its operands and writes its results once.
      bytes_accessed: the compiler's own total where it gives one; it counts a loop's body once, and on a TPU also
        what stays on the chip.
      unknown_loops: loops of which `flops` and `bytes_moved` count one turn, as the compiler does not know how many.
      convolutions: of a CUDA device, and what each carries in its kernel.
      live: what is alive at the peak, largest first; empty where the compiler wrote no buffer assignment.
      bound_seconds: the time below which the device cannot be, flops / peak or bytes / bandwidth, whichever is
        more, and bytes / bandwidth where 8 bits or fewer are multiplied; None for a CPU. It is a bound, not a
        prediction.
      bound_by: `flops` or `bytes`.
      versions: of what compiled it.
    """

    target: str
    devices: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    constant_bytes: int
    peak_bytes: int
    usable_bytes: int | None
    flops: int
    bytes_moved: dict[str, int]
    bytes_accessed: float | None
    unknown_loops: int
    convolutions: tuple[Convolution, ...]
    live: tuple[Buffer, ...]
    bound_seconds: float | None
    bound_by: str
    versions: dict[str, str]

    @property
    def total_moved(self) -> int:
        """Bytes moved, over all classes."""
        return sum(self.bytes_moved.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a program can have on the device."""
        return self.usable_bytes is None or self.peak_bytes <= self.usable_bytes

    @property
    def fused(self) -> dict[str, int]:
        """How many forward convolutions there are, and how many of them carry a bias, a residual, an activation."""
        forward = [conv for conv in self.convolutions if conv.kind == "forward"]
        return {
            "forward": len(forward),
            "bias": sum(conv.bias for conv in forward),
            "residual": sum(conv.residual for conv in forward),
            "activation": sum(bool(conv.activation) for conv in forward),
        }

    @property
    def live_by_role(self) -> dict[str, int]:
        """Bytes alive at the peak by `Buffer.role`."""
        total: dict[str, int] = {}
        for buffer in self.live:
            total[buffer.role] = total.get(buffer.role, 0) + buffer.nbytes
        return total

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          PlanError: if it is something else.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            fields["convolutions"] = tuple(Convolution(**each) for each in fields["convolutions"])
            fields["live"] = tuple(Buffer(**each) for each in fields["live"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan as this version writes it: {error}") from error

    def __str__(self) -> str:
        """A paragraph for a reader."""
        shared = f", one of {self.devices} devices" if self.devices > 1 else ""
        room = "" if self.usable_bytes is None else f" of {_mib(self.usable_bytes)} usable"
        held = [f"  constants     {_mib(self.constant_bytes)}"] if self.constant_bytes > 2**16 else []
        lines = [
            f"plan for {self.target}{shared} (by the compiler, not run)",
            f"  peak          {_mib(self.peak_bytes)}{room}{'' if self.fits else ': does not fit'}",
            f"  arguments     {_mib(self.argument_bytes)}, of them donated {_mib(self.aliased_bytes)}",
            f"  temporaries   {_mib(self.temporary_bytes)}",
            *held,
            f"  operations    {self.flops / 1e9:,.1f} GFLOP in convolutions and matrix products",
            f"  bytes moved   {self.total_moved / 1e9:,.2f} GB",
        ]
        lines += [f"    {name:24}{nbytes / 1e9:9,.3f} GB" for name, nbytes in self.bytes_moved.items() if nbytes]
        if self.unknown_loops:
            lines.append(f"  {self.unknown_loops} loops of unknown length count as one turn")
        if self.bound_seconds is not None:
            lines.append(f"  at least      {1e3 * self.bound_seconds:,.2f} ms a run, by its {self.bound_by} (a bound)")
        if self.convolutions:
            fused = self.fused
            lines.append(
                f"  of {fused['forward']} forward convolutions {fused['bias']} add a bias, {fused['residual']} a "
                f"residual, {fused['activation']} apply an activation in their kernel"
            )
        if self.live:
            lines.append("  alive at the peak, largest first:")
        lines += [
            f"    {_mib(buffer.nbytes):>14}  {buffer.shape:28} {buffer.role:9} {buffer.layer} {buffer.operation}"
            for buffer in self.live[:10]
        ]
        return "\n".join(lines)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
