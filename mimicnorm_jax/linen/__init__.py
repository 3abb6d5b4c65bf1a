"""Flax linen layers over the functions of `mimicnorm_jax.functional`."""

from mimicnorm_jax.linen.conv import CenteredConv, CenteredDense, TransformedConv, TransformedDense
from mimicnorm_jax.linen.dropout import Dropout
from mimicnorm_jax.linen.dynamic_tanh import DynamicTanh
from mimicnorm_jax.linen.last_norm import WithLastBatchNorm
from mimicnorm_jax.linen.norm import IdentityNorm, LastBatchNorm
from mimicnorm_jax.linen.selection import find_kernels, select_convolutions, select_kernels
from mimicnorm_jax.linen.table import tabulate
from mimicnorm_jax.linen.wrapper import Transformed

__all__ = [
    "CenteredConv",
    "CenteredDense",
    "Dropout",
    "DynamicTanh",
    "IdentityNorm",
    "LastBatchNorm",
    "Transformed",
    "TransformedConv",
    "TransformedDense",
    "WithLastBatchNorm",
    "find_kernels",
    "select_convolutions",
    "select_kernels",
    "tabulate",
]
