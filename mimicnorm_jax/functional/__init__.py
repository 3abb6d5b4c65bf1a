"""Pure functions of arrays, without Flax: kernels and their transforms, activations, pooling, normalized logits.

The list is as long as there are functions of a kernel, rules which kernels they take, and activations.
"""

from mimicnorm_jax.functional.activations import relu, relu6, relu_save_mask
from mimicnorm_jax.functional.binary import binarize, binary_sign, standardize_by_deviation
from mimicnorm_jax.functional.kernels import center, gain, scaled_standardize, standardize
from mimicnorm_jax.functional.logits import cross_entropy_floor
from mimicnorm_jax.functional.pooling import max_pool
from mimicnorm_jax.functional.rules import always, fan_in_above, never, ungrouped
from mimicnorm_jax.functional.transform import KernelTransform, compose

__all__ = [
    "KernelTransform",
    "always",
    "binarize",
    "binary_sign",
    "center",
    "compose",
    "cross_entropy_floor",
    "fan_in_above",
    "gain",
    "max_pool",
    "never",
    "relu",
    "relu6",
    "relu_save_mask",
    "scaled_standardize",
    "standardize",
    "standardize_by_deviation",
    "ungrouped",
]
