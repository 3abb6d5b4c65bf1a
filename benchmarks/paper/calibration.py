"""Calibration of a run's final network on all test images: how confident it is, how often right, and what scale mends.

In a process of its own, so that the networks of runs to come find the device empty.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from benchmarks import _process
from benchmarks._results import Record
from mimicnorm_jax.data import Dataset, load, normalize
from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import RunSpec, build_spec, read_config
from mimicnorm_jax.training.resilience import CheckpointReader

BINS = 15
"""Of equal width, of the confidence: the probability of the most probable class (Guo et al. 2017)."""
AGREEMENT = 1e-3
"""How far the accuracy may be from that of the run's own evaluation: another program flips near ties."""


def restored(folder: Path) -> tuple[RunSpec, Record, Dataset]:
    """The run in a folder, the variables of its newest checkpoint, and its data set.

    Raises:
      WorkdirError: if there is no checkpoint or it cannot be restored.
    """
    config = read_config(folder)
    spec = build_spec(config)
    checkpoints = CheckpointReader(folder / "checkpoints")
    if checkpoints.latest is None:
        raise WorkdirError(f"{folder} holds no checkpoint")
    state, _ = checkpoints.restore(checkpoints.latest, spec.state_template())
    return spec, state.eval_variables, load(config.dataset, config.data_dir)


def logits_of(spec: RunSpec, model: Any, variables: Record, data: Dataset) -> np.ndarray:
    """Logits `(N, classes)` of all test images.

    Args:
      spec: of the run.
      model: its network, or that without its head.
      variables: of the network.
      data: of the run.
    """
    config, images = spec.config, data.test.images

    @jax.jit
    def logits(variables: Record, images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images, data.mean, data.std, config.dtype)).astype(jnp.float32)

    batches = [images[start : start + config.batch_size] for start in range(0, len(images), config.batch_size)]
    return np.concatenate([logits(variables, batch) for batch in batches])


def reliability(logits: np.ndarray, labels: np.ndarray) -> Record:
    """How often a network is right, by how confident it is.

    Args:
      logits: `(N, classes)`.
      labels: `(N,)`.

    Returns:
      By bin of the confidence: `count`, the sum of confidences `confidence`, and `correct`; and over all images
      `loss`, the mean cross entropy in nats, and `accuracy`.
    """
    log_probs = _log_softmax(logits)
    confidence, right = np.exp(log_probs.max(-1)), log_probs.argmax(-1) == labels
    where = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return {
        "count": np.bincount(where, minlength=BINS).tolist(),
        "confidence": np.bincount(where, confidence, BINS).round(6).tolist(),
        "correct": np.bincount(where, right, BINS).astype(int).tolist(),
        "loss": round(_loss(log_probs, labels), 6),
        "accuracy": float(right.mean()),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _loss(log_probs: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_probs[np.arange(len(labels)), labels].mean())


def temperature_scaling(logits: np.ndarray, labels: np.ndarray) -> Record:
    """What dividing the logits by one number does, fitted on every other image and measured on the rest.

    Args:
      logits: `(N, classes)`.
      labels: `(N,)`.

    Returns:
      `temperature`, which minimizes the loss on the images it is fitted on, within a factor of 100 of 1; and
      `reliability` of the rest `before` and `after`.
    """
    fitted, rest = (slice(start, None, 2) for start in (0, 1))

    def loss(log_temperature: float) -> float:
        return _loss(_log_softmax(logits[fitted] / np.exp(log_temperature)), labels[fitted])

    bound = np.log(100.0)
    temperature = float(np.exp(scipy.optimize.fminbound(loss, -bound, bound)))
    before, after = (reliability(logits[rest] / scale, labels[rest]) for scale in (1.0, temperature))
    return {"temperature": round(temperature, 4), "before": before, "after": after}


def expected_calibration_error(bins: Record) -> float:
    """Mean distance of accuracy and confidence in the bins of `reliability`, weighted by their images; in [0, 1]."""
    apart = np.abs(np.array(bins["correct"]) - np.array(bins["confidence"]))
    return float(apart.sum() / sum(bins["count"]))


def overconfidence(bins: Record) -> float:
    """Mean confidence less accuracy, from the bins of `reliability`; below 0 where a network is too modest."""
    return float((sum(bins["confidence"]) - sum(bins["correct"])) / sum(bins["count"]))


def of_run(folder: Path) -> Record:
    """`reliability` of a finished run, and `temperature_scaling` under that name.

    Raises:
      SystemExit: if it cannot be evaluated, or not as the run evaluated itself.
    """
    return evaluated(folder, "paper.calibration", lambda found: found["accuracy"])


def evaluated(folder: Path, module: str, accuracy: Callable[[Record], float]) -> Record:
    """What `python -m benchmarks.MODULE --measure FOLDER` finds of a finished run.

    Args:
      folder: of the run.
      module: below `benchmarks`.
      accuracy: what it found where the run evaluated itself.

    Raises:
      SystemExit: if it cannot be evaluated, or not as the run evaluated itself.
    """
    found = _process.measure(module, str(folder.absolute()))
    if isinstance(found, int):
        sys.exit(f"error: {module} of {folder} ended with exit code {found}")
    final = json.loads((folder / "summary.json").read_text())["final_accuracy"]
    if abs(accuracy(found) - final) > AGREEMENT:
        sys.exit(f"error: the network of {folder} has accuracy {accuracy(found)}, and {final} by its own evaluation")
    return found


def main(name: str, description: str | None, measure: Callable[[RunSpec, Record, Dataset], Record]) -> None:
    """The command of a module that evaluates the run in a folder."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--measure", type=Path, metavar="DIR", required=True, help="folder of a finished run")
    print(json.dumps(measure(*restored(parser.parse_args().measure))))


def _measure(spec: RunSpec, variables: Record, data: Dataset) -> Record:
    logits, labels = logits_of(spec, spec.model, variables, data), data.test.labels
    return reliability(logits, labels) | {"temperature_scaling": temperature_scaling(logits, labels)}


if __name__ == "__main__":
    main("paper.calibration", __doc__, _measure)
