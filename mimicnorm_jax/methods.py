"""The methods compared in the paper, one record each: what stands around a convolution, by role."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method does to a network. `models.factory.LayerFactory` turns it into layers.

    Attributes:
      name: as in `METHODS`.
      summary: one line for a reader choosing.
      centers: whether the kernels that the network's rule names are centered.
      batch_norm: whether a BatchNorm follows every convolution.
      last_batch_norm: whether a `LastBatchNorm` stands on the logits.
      gain_scalars: whether the published learnable scalars (residual branches, ShuffleNetV2,
        MobileNetV2) are there.
      zero_scalars: whether residual branches end in a learnable scalar that starts at 0.
      fixup: whether residual branches are initialized and shifted by Fixup's rules.
    """

    name: str
    summary: str
    centers: bool = False
    batch_norm: bool = False
    last_batch_norm: bool = False
    gain_scalars: bool = False
    zero_scalars: bool = False
    fixup: bool = False

    @property
    def needs_residual_branches(self) -> bool:
        """Whether the method says nothing about a network without residual sums."""
        return self.zero_scalars or self.fixup


_ALL = (
    Method("batchnorm", "BatchNorm after every convolution", batch_norm=True),
    Method(
        "mimicnorm",
        "weight mean and one last BatchNorm on the logits (Fei et al. 2020)",
        centers=True,
        last_batch_norm=True,
        gain_scalars=True,
    ),
    Method("weightmean", "weight mean only", centers=True, gain_scalars=True),
    Method("lastbn", "one last BatchNorm on the logits only", last_batch_norm=True, gain_scalars=True),
    Method("none", "neither; the same scalars and initialization as MimicNorm", gain_scalars=True),
    Method("skipinit", "residual branches times a scalar from 0 (De & Smith 2020)", zero_scalars=True),
    Method("fixup", "Fixup initialization and scalar biases (Zhang et al. 2019)", fixup=True),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method by name."""
