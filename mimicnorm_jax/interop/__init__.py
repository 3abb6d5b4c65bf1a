"""Networks from and to other code: PyTorch state dicts, and variables in one file."""

from mimicnorm_jax.interop import torch
from mimicnorm_jax.interop.variables import read_variables, write_variables

__all__ = ["read_variables", "torch", "write_variables"]
