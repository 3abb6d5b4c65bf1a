"""The networks by name: `create` builds any of them under any method that makes sense for it."""

from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.creation import check_image, create, methods_of
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import HasHead, LastBatchNormHead, SplitNetwork
from mimicnorm_jax.models.registry import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ConvNorm",
    "HasHead",
    "LastBatchNormHead",
    "LayerFactory",
    "SplitNetwork",
    "check_image",
    "create",
    "methods_of",
    "scale_width",
]
