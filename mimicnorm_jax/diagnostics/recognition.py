"""Recognises kernels that are a parameter, scaled or centred, and biases, whatever code wrote them.

A linear map is tried on random numbers at random parameters: a map that looks like the identity, or like centring,
on a generic argument is it. What is not recognised is differentiated without assuming anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing import Site, TracedNetwork


@dataclass(frozen=True)
class Kernel:
    """A site whose kernel is one parameter, perhaps centred, times a factor of other parameters.

    Attributes:
      site: the product.
      leaf: the parameter.
      centred: whether the fan-in's mean is subtracted.
      scaled: whether there is a factor other than 1; its value may depend on the parameters.
      scalars: single numbers that the kernel depends on as well.
      bias: a parameter that is added to the product's channels and used nowhere else, or None.
    """

    site: Site
    leaf: int
    centred: bool
    scaled: bool
    scalars: tuple[int, ...]
    bias: int | None


def recognise(network: TracedNetwork, params: Sequence[Any]) -> dict[int, Kernel]:
    """The kernels of known form, by site.

    Args:
      network: traced.
      params: leaves of the parameters, arrays or shapes.
    """
    candidates = _candidates(network, params)
    if not candidates:
        return {}
    rng = np.random.default_rng(0)
    draw = [jnp.asarray(1 + rng.random(np.shape(leaf)), leaf.dtype) for leaf in params]
    probes = {
        i: jnp.asarray(rng.standard_normal(network.sites[i].product.kernel_shape), network.sites[i].dtype)
        for i in candidates
    }

    @jax.jit
    def try_out(chosen: dict[int, jax.Array], draw: list[jax.Array], probes: dict[int, jax.Array]) -> Any:
        def kernels(chosen: dict[int, jax.Array]) -> dict[int, jax.Array]:
            values = list(draw)
            for i, value in chosen.items():
                values[candidates[i]] = value
            seen = network.kernels(values)[0]
            return {i: seen[i].astype(probes[i].dtype) for i in candidates}

        pulled = jax.vjp(kernels, chosen)[1](probes)[0]
        return jax.jvp(kernels, (chosen,), (pulled,))[1], network.kernels(draw)[1]

    images, added = try_out({i: draw[leaf] for i, leaf in candidates.items()}, draw, probes)
    found: dict[int, Kernel] = {}
    for i, leaf in candidates.items():
        site = network.sites[i]
        form = _form(site, probes[i], images[i])
        if form is not None:
            scalars = tuple(other for other in site.leaves if other != leaf)
            is_bias = site.added is not None and _adds_entries(site, added[i], draw[site.added])
            found[i] = Kernel(site, leaf, *form, scalars, site.added if is_bias else None)
    return found


def _candidates(network: TracedNetwork, params: Sequence[Any]) -> dict[int, int]:
    """By site, the only parameter of the kernel's size, where all others are single numbers and it has no other use."""
    uses = [leaf for site in network.sites for leaf in site.leaves]
    candidates: dict[int, int] = {}
    for site in network.sites:
        sizes: Mapping[int, int] = {leaf: int(np.prod(params[leaf].shape)) for leaf in site.leaves}
        fitting = [leaf for leaf, size in sizes.items() if size == np.prod(site.product.kernel_shape) and size > 1]
        if len(fitting) == 1 and all(size == 1 for leaf, size in sizes.items() if leaf != fitting[0]):
            leaf = fitting[0]
            if uses.count(leaf) == 1 and leaf not in network.direct:
                candidates[site.index] = leaf
    return candidates


def _form(site: Site, probe: jax.Array, image: jax.Array) -> tuple[bool, bool] | None:
    """Of a positive multiple of `probe`, or of `probe` centred: whether it is centred, and whether it is scaled."""
    before, after = (np.asarray(site.product.kernel(v), np.float64) for v in (probe, image))
    tolerance = 100 * float(jnp.finfo(site.dtype).eps)
    for centred, expected in ((False, before), (True, before - before.mean(1, keepdims=True))):
        factor = np.vdot(expected, after) / max(np.vdot(expected, expected), 1e-300)
        if factor > 0 and np.linalg.norm(after - factor * expected) <= tolerance * np.linalg.norm(after):
            return centred, bool(abs(factor - 1) > tolerance)
    return None


def _adds_entries(site: Site, added: jax.Array, entries: jax.Array) -> bool:
    """Whether `added` holds, for each channel of the product, its own one of `entries` at every position."""
    _, groups, _, channels = site.product.sizes
    if entries.size != groups * channels or added.ndim != len(site.shape):
        return False
    spread = np.asarray(site.product.outputs(jnp.broadcast_to(added, site.shape)))
    return np.array_equal(spread, np.broadcast_to(np.asarray(entries).reshape(1, groups, channels), spread.shape))
