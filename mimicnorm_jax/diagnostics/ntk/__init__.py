"""The empirical neural tangent kernel."""

from mimicnorm_jax.diagnostics.ntk.empirical import EmpiricalNTK, empirical_ntk
from mimicnorm_jax.diagnostics.ntk.features import Output
from mimicnorm_jax.diagnostics.ntk.ntk_vector_products import ntk_vector_product
from mimicnorm_jax.diagnostics.ntk.plan import IMPLEMENTATIONS, Plan
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters, initial_variance

__all__ = [
    "IMPLEMENTATIONS",
    "EmpiricalNTK",
    "Output",
    "Plan",
    "Weights",
    "all_parameters",
    "empirical_ntk",
    "initial_variance",
    "ntk_vector_product",
]
