"""Trees, files, the console, the environment: what commands and benchmarks need beside their subject."""

from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import lock, write_text

__all__ = [
    "environment",
    "lock",
    "log_line",
    "write_text",
]
