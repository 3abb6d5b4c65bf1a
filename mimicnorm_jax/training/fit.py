"""Which batch fits a device, and what makes a run fit that does not."""

import dataclasses
from collections.abc import Callable

from mimicnorm_jax.errors import ConfigError, DoesNotFitError
from mimicnorm_jax.linen.remat import REMATS
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import dataset_of
from mimicnorm_jax.training.plan import TrainingPlan

PlanOf = Callable[[TrainConfig], TrainingPlan]
ROUND = 8
"""Images of a microbatch on one device by which the largest batch is found."""
_LINES = 4
"""Plans by a line through two others, before the search goes in steps."""
_GIB = 2**30


def missing_bytes(plan_of: PlanOf, config: TrainConfig) -> int | None:
    """What a run needs beyond what it can have, 0 or less if it fits; None if only known not to fit.

    Args:
      plan_of: such as `partial(plan_training, target="h100")`.
      config: of the run.
    """
    try:
        return plan_of(config).missing_bytes
    except DoesNotFitError as error:
        if error.needed is None or error.available is None:
            return None
        return max(1, error.needed - error.available)


def largest_batch(plan_of: PlanOf, config: TrainConfig, devices: int = 1) -> int:
    """The largest `config.batch_size` that fits, by a few plans.

    Two plans say how memory grows with the batch, from which the answer is guessed; it is then bracketed by plans of
    batches that fit and that do not, until they are `ROUND` images a microbatch and device apart. So both the answer
    and the next step up were compiled. Between the two, a compiler's choices need not be monotonic.

    Args:
      plan_of: such as `partial(plan_training, target="h100", devices=devices)`.
      config: of the run; its batch size is where the search starts.
      devices: that share a batch.

    Returns:
      A multiple of `ROUND` for each microbatch and device, at most the number of training images; 0 if not even the
      smallest such batch fits.

    Raises:
      ConfigError: if the dataset is smaller than the smallest batch.
    """
    unit = ROUND * devices * config.microbatches
    if unit > dataset_of(config).num_train:
        raise ConfigError(f"{config.dataset} has fewer than {unit} training images, the smallest batch that is tried")
    return _search(plan_of, config, unit)


def _search(plan_of: PlanOf, config: TrainConfig, unit: int) -> int:
    """The largest multiple of `unit` images that fits; 0 if none does."""
    top = dataset_of(config).num_train // unit
    if not top:
        return 0
    known: dict[int, int | None] = {}

    def fits(units: int) -> bool:
        if units not in known:
            known[units] = missing_bytes(plan_of, dataclasses.replace(config, batch_size=units * unit))
        found = known[units]
        return found is not None and found <= 0

    low, high = 0, top + 1  # low fits and high does not, as far as is known
    guess = min(top, max(1, config.batch_size // unit))
    for _ in range(_LINES):
        low, high = (max(low, guess), high) if fits(guess) else (low, min(high, guess))
        crossing = min(max(_crossing(known, low, high), 1), top)
        if crossing in known:
            break
        guess = crossing
    step = 1
    while high - low > 1:
        # Memory grows in steps, which a line does not see: ever further from its crossing, then between the two.
        beyond = guess + step if guess == low else guess - step
        inside = low < beyond < high
        step, guess = (2 * step, beyond) if inside else (top, (low + high) // 2)
        low, high = (guess, high) if fits(guess) else (low, guess)
    return low * unit


def _crossing(known: dict[int, int | None], low: int, high: int) -> int:
    """Where a line through the two plans next to the border crosses it."""
    points = sorted(((units, missing) for units, missing in known.items() if missing is not None), key=_distance)[:2]
    if len(points) < 2:
        return 2 * low if low else high // 2
    (a, missing_a), (b, missing_b) = sorted(points)
    return int(a - missing_a * (b - a) / (missing_b - missing_a)) if missing_b > missing_a else low or high


def _distance(point: tuple[int, int]) -> int:
    return abs(point[1])


def ways_out(plan_of: PlanOf, config: TrainConfig, devices: int = 1) -> list[str]:
    """Single changes of a config that does not fit which would make it fit: of microbatches, remat, or the batch.

    Args:
      plan_of: as in `largest_batch`.
      config: of the run.
      devices: that share a batch.
    """
    found = []
    share = config.batch_size // devices
    for parts in (2 * config.microbatches, 4 * config.microbatches):
        if share % parts == 0 and share // parts >= 2 and _fits(plan_of, config, "microbatches", parts):
            found.append(f"--config.microbatches={parts}")
            break
    for value in remat_values():
        if value != config.remat and _fits(plan_of, config, "remat", value):
            found.append(f"--config.remat={value}")
            break
    batch = _search(plan_of, config, ROUND * devices * config.microbatches)
    return [*found, f"--config.batch_size={batch}"] if batch else found


def remat_values() -> list[str]:
    """What `config.remat` may be, from what keeps most to what keeps least."""
    return list(REMATS)


def _fits(plan_of: PlanOf, config: TrainConfig, field: str, value: object) -> bool:
    changes: dict[str, object] = {field: value}
    try:
        missing = missing_bytes(plan_of, dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    except ConfigError:  # the network does not know this value
        return False
    return missing is not None and missing <= 0


def require_fit(plan_of: PlanOf, config: TrainConfig, devices: int = 1) -> TrainingPlan:
    """The plan of a run that fits.

    Args:
      plan_of: plans a run of a config.
      config: of the run.
      devices: that share a batch.

    Raises:
      DoesNotFitError: says how much is missing, and which of microbatches, remat or batch would make the run fit.
    """
    needed: int | None
    available: int | None
    try:
        found = plan_of(config)
        if found.fits:
            return found
        needed, available = found.peak_bytes, found.step.usable_bytes
    except DoesNotFitError as error:
        needed, available = error.needed, error.available
    ways = ways_out(plan_of, config, devices)
    sizes = ""
    if needed is not None and available is not None:
        amounts = (needed / _GIB, available / _GIB, (needed - available) / _GIB)
        sizes = ": it needs {:.2f} GiB of {:.2f} usable on each device, {:.2f} GiB too much".format(*amounts)
    advice = f"by the plan each of these fits: {', '.join(ways)}" if ways else "no smaller batch fits either"
    raise DoesNotFitError(
        f"{config.model}, {config.method}, config.batch_size={config.batch_size}: does not fit{sizes}; {advice}",
        needed,
        available,
    )
