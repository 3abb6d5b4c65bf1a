"""In which regime a network is: tangent kernels, NNGP kernels, Jacobians, curvature and large steps of any function.

The list has one entry for each question; more of tangent kernels stands in `diagnostics.ntk`, of eigenvalues in
`diagnostics.spectra`. Everything takes `apply_fn(params, x) -> (N, O)`; a Flax module becomes one by `from_linen`.

`batch_coupled`, an option of tangent kernels and of a `View` of the layers, says that the examples of a batch influence
one another, as with a BatchNorm in training mode. Derivatives are then those of the whole batch, through everyone's
statistics. If it is False (the default), that they do not is made sure of, once for each function and shapes: proved
from the jaxpr where that can be, else tried in numbers; a network whose examples do influence one another is refused
with the operation that brings them together.
"""

from mimicnorm_jax.diagnostics import ntk, regression, updates
from mimicnorm_jax.diagnostics.adapters import from_equinox, from_linen, from_nnx
from mimicnorm_jax.diagnostics.memory import nbytes, saved_for_backward
from mimicnorm_jax.diagnostics.ntk import EmpiricalNTK, empirical_ntk
from mimicnorm_jax.diagnostics.propagation import activation_kernel, nngp, perturbation_growth
from mimicnorm_jax.diagnostics.regime import RegimeMeter
from mimicnorm_jax.diagnostics.spectra import condition_number, curvature, jacobian, unit_diagonal
from mimicnorm_jax.diagnostics.tree_inputs import TreeInputs

__all__ = [
    "EmpiricalNTK",
    "RegimeMeter",
    "TreeInputs",
    "activation_kernel",
    "condition_number",
    "curvature",
    "empirical_ntk",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "jacobian",
    "nbytes",
    "nngp",
    "ntk",
    "perturbation_growth",
    "regression",
    "saved_for_backward",
    "unit_diagonal",
    "updates",
]
