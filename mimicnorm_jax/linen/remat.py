"""Rematerialization: what a network keeps for its backward pass, and what it computes again instead."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import linen as nn

from mimicnorm_jax.functional.activations import SAVED

Part = TypeVar("Part", bound=Callable[..., Any])

REMATS: dict[str, str] = {
    "none": "keep one map for each convolution, and recompute no convolution",
    "cheap": "recompute pointwise convolutions that do not narrow, and elementwise work",
    "stage": "keep what enters each stage, and recompute the rest of it",
}
"""Every rematerialization by name, with what it does."""
NO_REMAT = "none"
"""Nothing is recomputed but what the layers themselves recompute."""


def rematerialize(part: Part, remat: str) -> Part:
    """A part `(module, x) -> x` of a network, recomputed in the backward pass as `remat` says.

    Under `cheap` only what carries the name `SAVED` is kept, and what enters the part.

    Args:
      part: of a Flax module, which is its first argument.
      remat: one of `REMATS`.
    """
    if remat == NO_REMAT:
        return part
    only_saved = jax.checkpoint_policies.save_only_these_names(SAVED)
    return nn.remat(part, policy=only_saved if remat == "cheap" else None)
