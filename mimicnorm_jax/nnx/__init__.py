"""Flax NNX layers over the functions of `mimicnorm_jax.functional`: those of `mimicnorm_jax.linen`, to the bit."""

from mimicnorm_jax.nnx.conv import CenteredConv, CenteredLinear, TransformedConv, TransformedLinear
from mimicnorm_jax.nnx.norm import IdentityNorm, LastBatchNorm

__all__ = [
    "CenteredConv",
    "CenteredLinear",
    "IdentityNorm",
    "LastBatchNorm",
    "TransformedConv",
    "TransformedLinear",
]
