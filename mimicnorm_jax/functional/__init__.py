"""Pure functions of arrays, without Flax: kernels and their transforms, activations, pooling."""

from mimicnorm_jax.functional.activations import relu, relu6, relu_save_mask
from mimicnorm_jax.functional.binary import binarize, binary_sign, standardize_by_deviation
from mimicnorm_jax.functional.kernels import center, fan_in, gain, scaled_standardize, standardize
from mimicnorm_jax.functional.layout import KernelLayout, over_fan_in
from mimicnorm_jax.functional.pooling import max_pool
from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule, always, fan_in_above, never, ungrouped
from mimicnorm_jax.functional.transform import (
    CENTER,
    CENTER_PUBLISHED,
    IDENTITY,
    KernelFunction,
    KernelTransform,
    compose,
)

__all__ = [
    "CENTER",
    "CENTER_PUBLISHED",
    "IDENTITY",
    "PUBLISHED_CIFAR_RULE",
    "KernelFunction",
    "KernelLayout",
    "KernelTransform",
    "Rule",
    "always",
    "binarize",
    "binary_sign",
    "center",
    "compose",
    "fan_in",
    "fan_in_above",
    "gain",
    "max_pool",
    "never",
    "over_fan_in",
    "relu",
    "relu6",
    "relu_save_mask",
    "scaled_standardize",
    "standardize",
    "standardize_by_deviation",
    "ungrouped",
]
