"""Reading a network from its jaxpr: layers, kernels as functions of parameters, independence of examples."""

from mimicnorm_jax.diagnostics.tracing.independence import Verdict
from mimicnorm_jax.diagnostics.tracing.layers import View
from mimicnorm_jax.diagnostics.tracing.network import Evaluation, LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn

__all__ = ["ApplyFn", "Evaluation", "LayerCall", "TracedNetwork", "Verdict", "View"]
