"""MimicNorm (Fei et al., arXiv 2010.09278) in JAX and Flax: convolutional networks without intermediate BatchNorm."""

from mimicnorm_jax.activations import relu, relu6, relu_save_mask
from mimicnorm_jax.centring import (
    always,
    centre,
    centre_after_step,
    conv_kernels,
    fan_in,
    fan_in_above,
    gain,
    never,
    project,
    ungrouped,
)
from mimicnorm_jax.initialisation import SCHEMES
from mimicnorm_jax.layers import CentredConv, CentredDense, LastBatchNorm
from mimicnorm_jax.methods import METHODS, Method
from mimicnorm_jax.pooling import max_pool
from mimicnorm_jax.selection import select_convolutions

__all__ = [
    "METHODS",
    "SCHEMES",
    "CentredConv",
    "CentredDense",
    "LastBatchNorm",
    "Method",
    "always",
    "centre",
    "centre_after_step",
    "conv_kernels",
    "fan_in",
    "fan_in_above",
    "gain",
    "max_pool",
    "never",
    "project",
    "relu",
    "relu6",
    "relu_save_mask",
    "select_convolutions",
    "ungrouped",
]
