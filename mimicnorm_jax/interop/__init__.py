"""Networks from and to other code: any Flax network under MimicNorm, PyTorch, one file of variables, folds, exports."""

from mimicnorm_jax.interop import torch
from mimicnorm_jax.interop.conversion import layer_report, mimic, rescale_init
from mimicnorm_jax.interop.exporting import FORMATS, export
from mimicnorm_jax.interop.folding import absorb_batchnorm, fold
from mimicnorm_jax.interop.packing import PackedSize, packed_size
from mimicnorm_jax.interop.variables import read_variables, write_variables

__all__ = [
    "FORMATS",
    "PackedSize",
    "absorb_batchnorm",
    "export",
    "fold",
    "layer_report",
    "mimic",
    "packed_size",
    "read_variables",
    "rescale_init",
    "torch",
    "write_variables",
]
