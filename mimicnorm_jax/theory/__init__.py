"""Mean-field theory of wide networks at initialization, and its numerical verification."""

from mimicnorm_jax.theory import verify
from mimicnorm_jax.theory.duals import quadrature_dual, relu_dual
from mimicnorm_jax.theory.fisher import PairMoments, fisher_bound
from mimicnorm_jax.theory.mean_field import PLAIN, WEIGHT_MEAN, InfiniteMLP, S, batch_norm_chi, padded
from mimicnorm_jax.theory.random_mlp import KINDS, RandomMLP
from mimicnorm_jax.theory.stack import Stack

__all__ = [
    "KINDS",
    "PLAIN",
    "WEIGHT_MEAN",
    "InfiniteMLP",
    "PairMoments",
    "RandomMLP",
    "S",
    "Stack",
    "batch_norm_chi",
    "fisher_bound",
    "padded",
    "quadrature_dual",
    "relu_dual",
    "verify",
]
