"""Where a convolution stands in a network: what a method's residual rule may depend on."""

from dataclasses import dataclass, field
from typing import Literal

from mimicnorm_jax.init_schemes import KernelSpec

Role = Literal["conv", "residual_out", "shortcut"]
"""What a convolution is to its block: `residual_out` ends a branch that is summed onto the block's input, `shortcut`
stands beside that branch, and `conv` is any other."""


@dataclass(eq=False)
class Branch:
    """A branch of a block, made anew at every call of the block; it records its kernels as they are made.

    Attributes:
      block: the running index of its block over the whole net, from 1; None for a branch that is not summed.
      blocks: how many blocks the net has.
      length: how many convolutions the branch has.
      sums: how many branches were summed onto the block's input since a convolution last made it.
      kernels: of its convolutions so far, but those whose gain no scalar makes up for.
      made: how many convolutions it has so far.
    """

    block: int | None = None
    blocks: int = 1
    length: int = 1
    sums: int = 0
    kernels: list[KernelSpec] = field(default_factory=list, init=False)
    made: int = field(default=0, init=False)

    def record(self, kernel: KernelSpec, counts: bool) -> None:
        """One more convolution; `counts` says whether a scalar makes up for its gain.

        Args:
          kernel: of the convolution.
          counts: whether a scalar makes up for its gain.
        """
        self.made += 1
        if counts:
            self.kernels.append(kernel)


@dataclass(frozen=True)
class Site:
    """Where a convolution stands.

    Attributes:
      kernel: its kernel.
      role: see `Role`.
      branch: the branch that it belongs to, or beside which it is the shortcut; None for none.
      kernels: whose gain a scalar here makes up for: the branch's so far, this one included; outside of a branch this.
      starts_block: whether it reads the input of a block with a branch.
    """

    kernel: KernelSpec
    role: Role
    branch: Branch | None
    kernels: tuple[KernelSpec, ...]
    starts_block: bool

    @classmethod
    def of(cls, kernel: KernelSpec, counts: bool, role: Role, branch: Branch | None) -> "Site":
        """The site of a new convolution, which its branch records; `counts` as in `Branch.record`."""
        starts_block = branch is not None and (role == "shortcut" or branch.made == 0)
        own = (kernel,) if counts else ()
        if branch is None or role == "shortcut":
            return cls(kernel, role, branch, own, starts_block)
        branch.record(kernel, counts)
        return cls(kernel, role, branch, tuple(branch.kernels), starts_block)
