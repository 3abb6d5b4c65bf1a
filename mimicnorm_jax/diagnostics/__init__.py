"""In which regime a network is: tangent kernels, NNGP kernels, Jacobians, curvature and large steps of any function.

Everything takes `apply_fn(params, x) -> (N, O)`; a Flax module becomes one by `from_linen`.

`batch_coupled`, an option of tangent kernels and of a `View` of the layers, says that the examples of a batch influence
one another, as with a BatchNorm in training mode. Derivatives are then those of the whole batch, through everyone's
statistics. If it is False (the default), that they do not is made sure of, once for each function and shapes: proved
from the jaxpr where that can be, else tried in numbers; a network whose examples do influence one another is refused
with the operation that brings them together.
"""

from mimicnorm_jax.diagnostics import regime, regression, updates
from mimicnorm_jax.diagnostics.adapters import from_equinox, from_linen, from_nnx
from mimicnorm_jax.diagnostics.memory import nbytes, saved_for_backward
from mimicnorm_jax.diagnostics.ntk import (
    IMPLEMENTATIONS,
    EmpiricalNTK,
    Plan,
    ProjectedGradients,
    PseudoLogit,
    all_parameters,
    empirical_ntk,
    empirical_ntk_axes,
    empirical_ntk_fn,
    initial_variance,
    linearize,
    ntk_operator,
    ntk_vector_product,
    project_gradients,
)
from mimicnorm_jax.diagnostics.propagation import Growth, activation_kernel, nngp, perturbation_growth
from mimicnorm_jax.diagnostics.regime import Regime, RegimeMeter, describe_condition
from mimicnorm_jax.diagnostics.spectra import (
    Eigenvalues,
    Ends,
    Quadrature,
    Search,
    condition_number,
    curvature,
    jacobian,
    unit_diagonal,
)
from mimicnorm_jax.diagnostics.tracing import ApplyFn, View
from mimicnorm_jax.diagnostics.tree_inputs import TreeInputs

__all__ = [
    "IMPLEMENTATIONS",
    "ApplyFn",
    "Eigenvalues",
    "EmpiricalNTK",
    "Ends",
    "Growth",
    "Plan",
    "ProjectedGradients",
    "PseudoLogit",
    "Quadrature",
    "Regime",
    "RegimeMeter",
    "Search",
    "TreeInputs",
    "View",
    "activation_kernel",
    "all_parameters",
    "condition_number",
    "curvature",
    "describe_condition",
    "empirical_ntk",
    "empirical_ntk_axes",
    "empirical_ntk_fn",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "initial_variance",
    "jacobian",
    "linearize",
    "nbytes",
    "nngp",
    "ntk_operator",
    "ntk_vector_product",
    "perturbation_growth",
    "project_gradients",
    "regime",
    "regression",
    "saved_for_backward",
    "unit_diagonal",
    "updates",
]
