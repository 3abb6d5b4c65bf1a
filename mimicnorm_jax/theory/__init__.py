"""Mean-field theory of wide networks at initialization, and its numerical verification."""

from mimicnorm_jax.theory import figures, mean_field, random_mlp, simulation, verify
from mimicnorm_jax.theory.checks import Check, Observation, as_table, expect_between, expect_close
from mimicnorm_jax.theory.duals import DualActivation, quadrature_dual, relu_dual
from mimicnorm_jax.theory.fisher import WHITE, PairMoments, fisher_bound
from mimicnorm_jax.theory.mean_field import PLAIN, WEIGHT_MEAN, InfiniteMLP, S, batch_norm_chi, padded
from mimicnorm_jax.theory.observations import observe
from mimicnorm_jax.theory.random_mlp import KINDS, RandomMLP
from mimicnorm_jax.theory.stack import Stack

__all__ = [
    "KINDS",
    "PLAIN",
    "WEIGHT_MEAN",
    "WHITE",
    "Check",
    "DualActivation",
    "InfiniteMLP",
    "Observation",
    "PairMoments",
    "RandomMLP",
    "S",
    "Stack",
    "as_table",
    "batch_norm_chi",
    "expect_between",
    "expect_close",
    "figures",
    "fisher_bound",
    "mean_field",
    "observe",
    "padded",
    "quadrature_dual",
    "random_mlp",
    "relu_dual",
    "simulation",
    "verify",
]
