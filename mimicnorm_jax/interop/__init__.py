"""Networks from and to other code: any Flax network under MimicNorm, PyTorch state dicts, variables in one file."""

from mimicnorm_jax.interop import torch
from mimicnorm_jax.interop.conversion import layer_report, mimic, rescale_init
from mimicnorm_jax.interop.variables import read_variables, write_variables

__all__ = ["layer_report", "mimic", "read_variables", "rescale_init", "torch", "write_variables"]
