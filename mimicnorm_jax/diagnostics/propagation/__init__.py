"""How moments and perturbations travel through the layers."""

from mimicnorm_jax.diagnostics.propagation import nngp
from mimicnorm_jax.diagnostics.propagation.activations import activation_kernel
from mimicnorm_jax.diagnostics.propagation.growth import Growth, perturbation_growth

__all__ = ["Growth", "activation_kernel", "nngp", "perturbation_growth"]
