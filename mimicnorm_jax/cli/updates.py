"""What `mimicnorm diagnose updates` reports of a network."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimicnorm_jax.diagnostics import updates
from mimicnorm_jax.monitoring import BoundModel
from mimicnorm_jax.utils.console import log_line, table

RATES = tuple(10.0 ** np.arange(-4, 1.01, 0.5))
"""Learning rates of one step, by default."""


def report(found: BoundModel, batch: updates.Batch, rates: Sequence[float]) -> dict[str, Any]:
    """Prints and returns what large steps do to a network, and what its gradient is made of.

    Args:
      found: the network.
      batch: training images and labels.
      rates: of one step.
    """
    network = found.apply_fn, found.params, batch
    losses = updates.relative_losses(*network, rates)
    log_line(f"{found.name}\n{'learning rate':>14}{'loss after one step, relative':>32}")
    for rate, loss in zip(rates, losses, strict=True):
        log_line(f"{rate:>14.3g}{loss:>32.4g}" + ("  diverged" if loss > updates.DIVERGED else ""))
    best, largest = float(rates[int(np.argmin(losses))]), float(max(rates))
    steps = (0.0, best, largest)
    moments = updates.channel_moments(*network, steps)
    ratios = updates.cancellation(*network)
    after_steps = ", ".join(f"{step:.3g}" for step in steps)
    log_line(f"channel |mean| and variance, means over channels, after a step of {after_steps}")
    layers = {}
    for name, channels in moments.items():
        means, variances = abs(channels.means).mean(1), channels.variances.mean(1)
        cells = "".join(f"{mean:>11.3g}{variance:>10.3g}" for mean, variance in zip(means, variances, strict=True))
        log_line(f"{name:36}{cells}   cancellation {ratios[name]:.3g}")
        layers[name] = {"abs_mean": means.tolist(), "variance": variances.tolist(), "cancellation": ratios[name]}
    after, before = (
        updates.dominance(updates.logit_gradient(*network, before_last_norm=before)) for before in (False, True)
    )
    shown = {
        "best learning rate of one step": f"{best:.3g}",
        "least rate at which the loss grows a thousandfold": _least(rates, losses > updates.DIVERGED),
        "cancellation ratio, median over layers": f"{np.nanmedian(list(ratios.values())):.3g}",
        "share of one class in the gradient by the logits": f"{after:.3f}",
        "share of one class before a norm on the logits": f"{before:.3f}",
    }
    log_line(table(shown))
    finite = [float(loss) if np.isfinite(loss) else None for loss in losses]
    return {"rates": list(rates), "relative_losses": finite, "steps": list(steps), "layers": layers, **shown}


def _least(rates: Sequence[float], where: np.ndarray) -> str:
    found = [rate for rate, is_there in zip(rates, where, strict=True) if is_there]
    return f"{min(found):.3g}" if found else f"above {max(rates):.3g}"
