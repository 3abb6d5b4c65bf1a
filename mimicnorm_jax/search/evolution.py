"""Evolution of paths: the best architecture by a score, under a limit on its cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mimicnorm_jax.search.space import Path, SearchSpace

Measure = Callable[[Path], float]


@dataclass(frozen=True)
class Evolution:
    """How paths evolve; the defaults are BN-NAS'.

    Attributes:
      rounds: after the first, random population.
      population: paths a round.
      parents: the best so far, from which a round is bred.
      mutations: children of a round that are a parent with each choice drawn anew by chance.
      mutation_rate: that chance.
      crossovers: children of a round that take each choice from one of two parents. What mutations and crossovers
        leave of the population is random.
      tries: for one child that is new and under the limit; then it is left out.

    Raises:
      ValueError: for a number that is negative, no parents, population or tries, a chance that is none, and for more
        children than the population.
    """

    rounds: int = 20
    population: int = 50
    parents: int = 10
    mutations: int = 25
    mutation_rate: float = 0.1
    crossovers: int = 25
    tries: int = 100

    def __post_init__(self) -> None:
        for name in ("rounds", "population", "parents", "mutations", "crossovers", "tries"):
            least = int(name in ("population", "parents", "tries"))
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}: it is at least {least}")
        if not 0 <= self.mutation_rate <= 1:
            raise ValueError(f"mutation_rate={self.mutation_rate}: it is a chance, from 0 to 1")
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"mutations={self.mutations} and crossovers={self.crossovers} are more than population="
                f"{self.population}, of which they are a part"
            )


def evolve(
    space: SearchSpace, score: Measure, *, cost: Measure, limit: float, seed: int = 0, how: Evolution | None = None
) -> list[Path]:
    """Searches a space for the path of the highest score among those that cost at most the limit.

    Args:
      space: of the choices.
      score: of a path, to be high; asked once a path.
      cost: of a path, such as its operations.
      limit: of the cost.
      seed: of all random numbers: the same seed gives the same paths.
      how: sizes and chances; None for the published ones.

    Returns:
      All paths that were seen, none twice, the best first; of equal ones the earlier first.

    Raises:
      ValueError: if no random path is under the limit, and for a score that is not a number.
    """
    how, generator = how or Evolution(), np.random.default_rng(seed)
    seen: dict[Path, float] = {}

    def fill(count: int, breed: Callable[[], Path]) -> None:
        for _ in range(count):
            for _ in range(how.tries):
                child = breed()
                if child not in seen and cost(child) <= limit:
                    seen[child] = value = score(child)
                    if math.isnan(value):
                        raise ValueError(f"the score of {child} is not a number: it cannot be ranked")
                    break

    def random() -> Path:
        return space.sample(generator)

    fill(how.population, random)
    if not seen:
        raise ValueError(f"of {how.tries * how.population} random paths none costs at most {limit:g}: raise the limit")
    for _ in range(how.rounds):
        parents = ranked(seen)[: how.parents]

        def parent(among: list[Path] = parents) -> Path:
            return among[generator.integers(len(among))]

        def mutate(parent: Callable[[], Path] = parent) -> Path:
            return _mixed(parent(), random(), generator.random(space.num_layers) < how.mutation_rate)

        def cross(parent: Callable[[], Path] = parent) -> Path:
            return _mixed(parent(), parent(), generator.random(space.num_layers) < 0.5)

        fill(how.mutations, mutate)
        fill(how.crossovers, cross)
        fill(how.population - how.mutations - how.crossovers, random)
    return ranked(seen)


def ranked(seen: dict[Path, float]) -> list[Path]:
    """Paths by score, the best first; of equal ones the earlier first."""
    return sorted(seen, key=lambda path: -seen[path])


def _mixed(path: Path, other: Path, takes_other: np.ndarray) -> Path:
    return tuple(b if takes else a for a, b, takes in zip(path, other, takes_other, strict=True))
