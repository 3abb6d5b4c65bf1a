r"""What a large step along the gradient does to a network, and what its gradient is made of (Bjorck et al. 2018).

The measurements of Understanding Batch Normalization (arXiv 1806.02375) for any network and any loss of its outputs:
how the loss changes along the gradient, what happens to the channels' means and variances on the way, whether the terms
of a kernel's gradient agree or cancel, and whether the gradient by the logits prefers some class. The whole batch is
differentiated at once, so examples may influence one another; a network is taken in the mode that `apply_fn` has, and
what is meant is mostly training.
"""

from mimicnorm_jax.diagnostics.updates.gradients import cancellation, dominance, logit_gradient
from mimicnorm_jax.diagnostics.updates.steps import (
    DIVERGED,
    Batch,
    Channels,
    channel_moments,
    relative_losses,
    softmax_loss,
)

__all__ = [
    "DIVERGED",
    "Batch",
    "Channels",
    "cancellation",
    "channel_moments",
    "dominance",
    "logit_gradient",
    "relative_losses",
    "softmax_loss",
]
