"""What a program will take on a device, seen without the device: memory, operations, bytes moved, by its compiler.

`plan(function, *shapes, target="h100")` for any function; `python -m mimicnorm_jax plan` for a training run.
"""

from mimicnorm_jax.planning.cache import Cache
from mimicnorm_jax.planning.compile import plan
from mimicnorm_jax.planning.plans import Plan
from mimicnorm_jax.planning.targets import NAMES, Target, target

__all__ = ["NAMES", "Cache", "Plan", "Target", "plan", "target"]
