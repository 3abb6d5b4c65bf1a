"""Networks from and to other code: PyTorch state dicts, variables in one file, folded networks, exports."""

from mimicnorm_jax.interop import torch
from mimicnorm_jax.interop.exporting import export
from mimicnorm_jax.interop.folding import absorb_batchnorm, fold
from mimicnorm_jax.interop.variables import read_variables, write_variables

__all__ = ["absorb_batchnorm", "export", "fold", "read_variables", "torch", "write_variables"]
