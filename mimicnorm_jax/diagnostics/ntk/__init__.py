"""The empirical neural tangent kernel."""

from mimicnorm_jax.diagnostics.ntk.axes import empirical_ntk_axes
from mimicnorm_jax.diagnostics.ntk.empirical import EmpiricalNTK, empirical_ntk
from mimicnorm_jax.diagnostics.ntk.function import empirical_ntk_fn
from mimicnorm_jax.diagnostics.ntk.jacobians import Output
from mimicnorm_jax.diagnostics.ntk.linearized import linearize
from mimicnorm_jax.diagnostics.ntk.ntk_vector_products import ntk_vector_product
from mimicnorm_jax.diagnostics.ntk.operator import ntk_operator
from mimicnorm_jax.diagnostics.ntk.plan import IMPLEMENTATIONS, Plan
from mimicnorm_jax.diagnostics.ntk.projections import ProjectedGradients, project_gradients
from mimicnorm_jax.diagnostics.ntk.pseudo import PseudoLogit
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters, initial_variance

__all__ = [
    "IMPLEMENTATIONS",
    "EmpiricalNTK",
    "Output",
    "Plan",
    "ProjectedGradients",
    "PseudoLogit",
    "Weights",
    "all_parameters",
    "empirical_ntk",
    "empirical_ntk_axes",
    "empirical_ntk_fn",
    "initial_variance",
    "linearize",
    "ntk_operator",
    "ntk_vector_product",
    "project_gradients",
]
