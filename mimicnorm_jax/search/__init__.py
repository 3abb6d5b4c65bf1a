"""Search by the scale (BN-NAS, Chen et al. 2021): train nothing but scales of a supernet, judge networks by them."""

from mimicnorm_jax.search.cost import flops
from mimicnorm_jax.search.evolution import Evolution, evolve
from mimicnorm_jax.search.network import Supernet, of_path, supernet
from mimicnorm_jax.search.scales import make_step, published_optimizer, scales_only, scores, total
from mimicnorm_jax.search.space import PUBLISHED, SMALL, Path, SearchSpace

__all__ = [
    "PUBLISHED",
    "SMALL",
    "Evolution",
    "Path",
    "SearchSpace",
    "Supernet",
    "evolve",
    "flops",
    "make_step",
    "of_path",
    "published_optimizer",
    "scales_only",
    "scores",
    "supernet",
    "total",
]
