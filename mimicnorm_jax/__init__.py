"""MimicNorm (Fei et al., arXiv 2010.09278) in JAX and Flax: convolutional networks without intermediate BatchNorm."""

from importlib.metadata import PackageNotFoundError, version

from mimicnorm_jax import initializers
from mimicnorm_jax.functional import KernelTransform, center, gain, max_pool, relu
from mimicnorm_jax.linen import CenteredConv, CenteredDense, LastBatchNorm, select_convolutions
from mimicnorm_jax.methods import METHODS, Method
from mimicnorm_jax.optim import keep_kernels_centered

try:
    __version__ = version("mimicnorm_jax")
except PackageNotFoundError:  # a clone on PYTHONPATH
    __version__ = "unknown"

__all__ = [
    "METHODS",
    "CenteredConv",
    "CenteredDense",
    "KernelTransform",
    "LastBatchNorm",
    "Method",
    "center",
    "gain",
    "initializers",
    "keep_kernels_centered",
    "max_pool",
    "relu",
    "select_convolutions",
]
