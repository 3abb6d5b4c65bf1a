"""MimicNorm (Fei et al., arXiv 2010.09278) in JAX and Flax: convolutional networks without intermediate BatchNorm."""

from importlib.metadata import PackageNotFoundError, version

from mimicnorm_jax.functional.activations import relu, relu6, relu_save_mask
from mimicnorm_jax.functional.kernels import (
    always,
    center,
    center_params,
    fan_in,
    fan_in_above,
    gain,
    keep_kernels_centered,
    never,
    select_conv_kernels,
    ungrouped,
)
from mimicnorm_jax.functional.pooling import max_pool
from mimicnorm_jax.init_schemes import SCHEMES
from mimicnorm_jax.linen.layers import CenteredConv, CenteredDense, LastBatchNorm
from mimicnorm_jax.linen.selection import select_convolutions
from mimicnorm_jax.methods import METHODS, Method

try:
    __version__ = version("mimicnorm_jax")
except PackageNotFoundError:  # a clone on PYTHONPATH
    __version__ = "unknown"

__all__ = [
    "METHODS",
    "SCHEMES",
    "CenteredConv",
    "CenteredDense",
    "LastBatchNorm",
    "Method",
    "always",
    "center",
    "center_params",
    "fan_in",
    "fan_in_above",
    "gain",
    "keep_kernels_centered",
    "max_pool",
    "never",
    "relu",
    "relu6",
    "relu_save_mask",
    "select_conv_kernels",
    "select_convolutions",
    "ungrouped",
]
