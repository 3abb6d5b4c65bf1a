"""Spectra of tangent kernels, Jacobians and curvature: dense, or from products with vectors."""

from mimicnorm_jax.diagnostics.spectra import curvature, jacobian, lanczos
from mimicnorm_jax.diagnostics.spectra.conditioning import condition_number, unit_diagonal
from mimicnorm_jax.diagnostics.spectra.jacobian import Quadrature
from mimicnorm_jax.diagnostics.spectra.lanczos import Eigenvalues, Search
from mimicnorm_jax.diagnostics.spectra.operators import Ends, LinearOperator

__all__ = [
    "Eigenvalues",
    "Ends",
    "LinearOperator",
    "Quadrature",
    "Search",
    "condition_number",
    "curvature",
    "jacobian",
    "lanczos",
    "unit_diagonal",
]
