"""Transformations of updates and parameters, for Optax."""

from mimicnorm_jax.optim.fixed_norm import FixedNormState, hyperball, lawn, select_all_kernels
from mimicnorm_jax.optim.projection import Select, center_params, keep_kernels_centered, select_conv_kernels

__all__ = [
    "FixedNormState",
    "Select",
    "center_params",
    "hyperball",
    "keep_kernels_centered",
    "lawn",
    "select_all_kernels",
    "select_conv_kernels",
]
