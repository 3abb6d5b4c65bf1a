"""What kernels are for: regression, classification, predictions of wide networks, and alignment with labels.

Any positive semidefinite kernel will do: empirical or infinitely wide, of one output or of all pairs. Algebra on
matrices is done by LAPACK in float64 on the host, whatever precision JAX computes in.
"""

from mimicnorm_jax.diagnostics.regression.alignment import alignment
from mimicnorm_jax.diagnostics.regression.conjugate_gradients import Nystrom, conjugate_gradients
from mimicnorm_jax.diagnostics.regression.matrices import class_targets
from mimicnorm_jax.diagnostics.regression.predictions import GaussianProcess, gaussian_process, gradient_flow
from mimicnorm_jax.diagnostics.regression.ridge import GCV, RidgeFit, generalized_cross_validation, ridge_regression

__all__ = [
    "GCV",
    "GaussianProcess",
    "Nystrom",
    "RidgeFit",
    "alignment",
    "class_targets",
    "conjugate_gradients",
    "gaussian_process",
    "generalized_cross_validation",
    "gradient_flow",
    "ridge_regression",
]
