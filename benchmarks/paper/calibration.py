"""Calibration of a run's final network on all test images: how confident it is, and how often it is right.

In a process of its own, so that the networks of runs to come find the device empty.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks import _process
from benchmarks._results import Record
from mimicnorm_jax.data import datasets, normalize
from mimicnorm_jax.training import RunSpec, workdir
from mimicnorm_jax.training.model import eval_logits
from mimicnorm_jax.training.resilience.checkpoints import Checkpoints
from mimicnorm_jax.training.spec import validate_run

BINS = 15
"""Of equal width, of the confidence: the probability of the most probable class (Guo et al. 2017)."""
AGREEMENT = 1e-3
"""How far the accuracy may be from that of the run's own evaluation: another program flips near ties."""


def logits_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(N, classes)` of the newest checkpoint of a run, and labels `(N,)`, of all test images.

    Raises:
      WorkdirError: if there is no checkpoint or it cannot be restored.
    """
    config = workdir.read_config(folder)
    spec: RunSpec = validate_run(config)
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        found = checkpoints.restore_newest(spec.state_template())
    if found is None:
        raise workdir.WorkdirError(f"{folder} holds no checkpoint")
    data = datasets.load(config.dataset, config.data_dir)

    @jax.jit
    def logits(variables: Record, images: jax.Array) -> jax.Array:
        return eval_logits(spec.model, variables, normalize(images, data.mean, data.std, config.dtype))

    images, labels = data.test.images, data.test.labels
    batches = [images[start : start + config.batch_size] for start in range(0, len(labels), config.batch_size)]
    return np.concatenate([logits(found[0].eval_variables, batch) for batch in batches]), np.asarray(labels)


def reliability(logits: np.ndarray, labels: np.ndarray) -> Record:
    """How often a network is right, by how confident it is.

    Args:
      logits: `(N, classes)`.
      labels: `(N,)`.

    Returns:
      By bin of the confidence: `count`, the sum of confidences `confidence`, and `correct`; and over all images
      `loss`, the mean cross entropy in nats, and `accuracy`.
    """
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    confidence, right = np.exp(log_probs.max(-1)), log_probs.argmax(-1) == labels
    where = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return {
        "count": np.bincount(where, minlength=BINS).tolist(),
        "confidence": np.bincount(where, confidence, BINS).round(6).tolist(),
        "correct": np.bincount(where, right, BINS).astype(int).tolist(),
        "loss": round(float(-log_probs[np.arange(len(labels)), labels].mean()), 6),
        "accuracy": float(right.mean()),
    }


def expected_calibration_error(bins: Record) -> float:
    """Mean distance of accuracy and confidence in the bins of `reliability`, weighted by their images; in [0, 1]."""
    apart = np.abs(np.array(bins["correct"]) - np.array(bins["confidence"]))
    return float(apart.sum() / sum(bins["count"]))


def of_run(folder: Path) -> Record:
    """`reliability` of a finished run.

    Raises:
      SystemExit: if it cannot be evaluated, or not as the run evaluated itself.
    """
    found = _process.measure("paper.calibration", str(folder.absolute()))
    if isinstance(found, int):
        sys.exit(f"error: the calibration of {folder} ended with exit code {found}")
    final = json.loads((folder / "summary.json").read_text())["final_accuracy"]
    if abs(found["accuracy"] - final) > AGREEMENT:
        sys.exit(f"error: the network of {folder} has accuracy {found['accuracy']}, and {final} by its own evaluation")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.paper.calibration", description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="DIR", required=True, help="folder of a finished run")
    print(json.dumps(reliability(*logits_of(parser.parse_args().measure))))
