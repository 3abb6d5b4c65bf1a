"""Transformations of updates and parameters, for Optax."""

from mimicnorm_jax.optim.projection import Select, center_params, keep_kernels_centered, select_conv_kernels

__all__ = ["Select", "center_params", "keep_kernels_centered", "select_conv_kernels"]
