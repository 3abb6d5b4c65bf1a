"""The methods by name: each is one small record, shared by all architectures.

The list is as long as there are parts that a method is composed of.
"""

import math

from mimicnorm_jax.functional.binary import standardize_by_deviation
from mimicnorm_jax.functional.kernels import scaled_standardize, standardize
from mimicnorm_jax.linen.norm import LastBatchNorm
from mimicnorm_jax.methods.activations import Activation, FlaxActivation, LeanActivation
from mimicnorm_jax.methods.method import CENTERED, ConvTransform, Method
from mimicnorm_jax.methods.norms import BatchNorm, DynamicTanh, GroupNorm, Norm
from mimicnorm_jax.methods.residuals import AlphaBeta, DepthScalars, Fixup, GainScalars, Residual, SkipInit

_ALL = (
    Method("batchnorm", "BatchNorm after every convolution", norm=BatchNorm()),
    Method(
        "mimicnorm",
        "weight mean and one last BatchNorm on the logits (Fei et al. 2020)",
        kernel_transform=CENTERED,
        residual=GainScalars(),
        last_norm=LastBatchNorm,
    ),
    Method("weightmean", "weight mean only", kernel_transform=CENTERED, residual=GainScalars()),
    Method("lastbn", "one last BatchNorm on the logits only", residual=GainScalars(), last_norm=LastBatchNorm),
    Method("none", "neither; the same scalars and initialization as MimicNorm", residual=GainScalars()),
    Method("skipinit", "residual branches times a scalar from 0 (De & Smith 2020)", residual=SkipInit()),
    Method("fixup", "Fixup initialization and scalar biases (Zhang et al. 2019)", residual=Fixup()),
    Method(
        "ws_gn",
        "weight standardization and GroupNorm after every convolution (Qiao et al. 2019)",
        kernel_transform=ConvTransform(standardize),
        norm=GroupNorm(),
    ),
    Method(
        "nf",
        "scaled weight standardization and sums of known variance (NF-ResNets, Brock et al. 2021)",
        kernel_transform=ConvTransform(scaled_standardize),
        residual=AlphaBeta(),
        activation=LeanActivation(gain=math.sqrt(2 / (1 - 1 / math.pi))),
    ),
    Method("groupnorm", "GroupNorm after every convolution (Wu & He 2018)", norm=GroupNorm()),
    Method("dyt", "gamma tanh(alpha x) + beta after every convolution, without statistics (DyT)", norm=DynamicTanh()),
    Method(
        "bnn_nobn",
        "binary networks by scaled weight standardization and sums of known variance (Chen et al. 2021)",
        kernel_transform=ConvTransform(standardize_by_deviation),
        residual=AlphaBeta(skip_gain=None, channel_gains=True),
        for_binary=True,
    ),
    Method(
        "bnn_mimic",
        "binary networks by weight mean before the sign, one last BatchNorm and scalars on branches",
        kernel_transform=CENTERED,
        residual=DepthScalars(),
        last_norm=LastBatchNorm,
        for_binary=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method by name."""

__all__ = [
    "METHODS",
    "Activation",
    "AlphaBeta",
    "BatchNorm",
    "ConvTransform",
    "DepthScalars",
    "DynamicTanh",
    "Fixup",
    "FlaxActivation",
    "GainScalars",
    "GroupNorm",
    "LeanActivation",
    "Method",
    "Norm",
    "Residual",
    "SkipInit",
]
