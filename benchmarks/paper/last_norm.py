"""A finished run with other running statistics of its last BatchNorm: whether evaluation loses what training reached.

Training never reads them, so one trained network tells all: its test images are normalized by what its logits before
the norm have as moments. In a process of its own, as `calibration`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._results import Record
from benchmarks.paper.calibration import evaluated, logits_of, main, reliability
from mimicnorm_jax.data import Augmentation, Dataset, augment, normalize
from mimicnorm_jax.training import RunSpec

AS_TRAINED = "as trained"
MOMENTUM = 0.99
RULES = {
    AS_TRAINED: "running averages of momentum 0.9, biased variance",
    "unbiased": "the same, variance times B / (B - 1)",
    "momentum": f"a further epoch of running averages of momentum {MOMENTUM}, parameters at rest",
    "training images": "moments over all training images, augmented",
    "test images": "moments over all test images themselves",
}
"""What stands for the logits' moments in evaluation, and what it is."""


class Moments(NamedTuple):
    """Mean and biased variance, `(C,)`, or of each of several batches `(batches, C)`."""

    mean: np.ndarray
    var: np.ndarray


def statistics(trained: Moments, batches: Moments, batch_size: int, test: np.ndarray) -> dict[str, Moments]:
    """The moments of each of `RULES`.

    Args:
      trained: of the running averages, biased.
      batches: of the training images, all batches of one size.
      batch_size: of them.
      test: logits before the norm of the test images, `(N, C)`.
    """
    left = MOMENTUM ** np.arange(len(batches.mean) - 1, -1, -1)
    running = [
        MOMENTUM ** len(left) * old + (1 - MOMENTUM) * left @ new for old, new in zip(trained, batches, strict=True)
    ]
    return {
        AS_TRAINED: trained,
        "unbiased": Moments(trained.mean, trained.var * batch_size / (batch_size - 1)),
        "momentum": Moments(*running),
        "training images": Moments(batches.mean.mean(0), batches.var.mean(0) + batches.mean.var(0)),
        "test images": Moments(test.mean(0), test.var(0)),
    }


def _training_moments(spec: RunSpec, body: Any, params: Record, data: Dataset) -> Moments:
    """Of an epoch's batches, augmented and with dropout as in training."""
    config, labels = spec.config, data.train.labels
    augmentation = Augmentation(config.crop_padding, config.flip, config.rotation)

    @jax.jit
    def moments(params: Record, key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = augment(jax.random.split(key, len(images)), images, augmentation)
        images = normalize(images, data.mean, data.std, config.dtype)
        z = body.apply({"params": params}, images, train=True, rngs={"dropout": key}).astype(jnp.float32)
        return z.mean(0), z.var(0)

    steps = len(labels) // config.batch_size
    order = np.random.default_rng(config.seed).permutation(len(labels))[: steps * config.batch_size]
    found = [
        moments(params, jax.random.fold_in(jax.random.key(config.seed), i), data.train.images[chosen])
        for i, chosen in enumerate(order.reshape(steps, -1))
    ]
    return Moments(*(np.stack([np.asarray(each[i], np.float64) for each in found]) for i in (0, 1)))


def measure(spec: RunSpec, variables: Record, data: Dataset) -> Record:
    """Accuracy and loss in nats on all test images under each of `RULES`.

    Args:
      spec: of a run whose last BatchNorm is its only norm over images, and whose running variance is biased.
      variables: of its network.
      data: of the run.
    """
    split = spec.model.split_head()
    assert split is not None
    assert spec.config.running_variance == "biased"
    test = logits_of(spec, split.body, {"params": variables["params"]}, data).astype(np.float64)
    stats = variables["batch_stats"][split.name]
    trained = Moments(np.asarray(stats["mean"], np.float64), np.asarray(stats["var"], np.float64))
    batches = _training_moments(spec, split.body, variables["params"], data)
    found = {}
    for rule, (mean, var) in statistics(trained, batches, spec.config.batch_size, test).items():
        bins = reliability((test - mean) / np.sqrt(var + split.head.epsilon), data.test.labels)
        found[rule] = {name: bins[name] for name in ("accuracy", "loss")}
    return found


def of_run(folder: Path) -> Record:
    """`measure` of a finished run.

    Raises:
      SystemExit: if it cannot be evaluated, or not as the run evaluated itself.
    """
    return evaluated(folder, "paper.last_norm", lambda found: found[AS_TRAINED]["accuracy"])


if __name__ == "__main__":
    main("paper.last_norm", __doc__, measure)
