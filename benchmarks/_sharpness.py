"""Networks whose sharpness is measured, and the records of it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._results import Record
from mimicnorm_jax import models
from mimicnorm_jax.data import load, normalize
from mimicnorm_jax.diagnostics import curvature, from_linen
from mimicnorm_jax.diagnostics.updates import softmax_loss
from mimicnorm_jax.linen import LastBatchNorm
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.theory import PairMoments, RandomMLP, Stack, fisher_bound

Apply = Callable[[Any, jax.Array], jax.Array]
RATES = tuple(float(rate) for rate in 10 ** np.linspace(-3.5, 1, 19))
COARSE = RATES[::2]
"""Of the convolutional network."""
EPOCHS, BATCH, MOMENTUM = 5, 128, 0.9
CURVED = 512
"""Training images of which the curvature is taken, as one batch."""
DEPTH = 4
"""Layers of the dense networks."""


class Form(NamedTuple):
    """One size of the study.

    Attributes:
      width: of the dense networks.
      digits, photographs: factors on the channels of networks that see them.
      images: photographs of which the curvature is taken, as one batch.
    """

    width: int
    digits: float
    photographs: float
    images: int


FORMS = {"small": Form(256, 0.5, 0.25, 128), "full": Form(1000, 1.0, 1.0, 512)}
"""Small, for a CPU; the width of the theory's paper and networks of full width, for a GPU."""
BOTH = dataclasses.replace(METHODS["batchnorm"], name="batchnorm and lastbn", last_norm=LastBatchNorm)
NORMS = {"neither": "none", "hidden layers": "batchnorm", "logits": "lastbn", "both": BOTH}
"""Where BatchNorm stands, and the method of it."""
NETS = {"mlp": "digits", "resnet8": "digits", "resnet18": "cifar100", "vgg11": "cifar100"}
"""Networks of the norms, and the images that they see."""


def squared_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Half the mean squared distance to one-hot labels."""
    return ((outputs - jax.nn.one_hot(labels, outputs.shape[1])) ** 2).sum(1).mean() / 2


read = functools.cache(load)


def digits() -> tuple[jax.Array, jax.Array]:
    """Training images, normalized, and labels."""
    data = read("digits", "")
    images = normalize(jnp.asarray(data.train.images), data.mean, data.std, jnp.float32)
    return images, jnp.asarray(data.train.labels)


def _make_stack(method: str, gamma: float, width: int) -> Stack:
    scale = gamma if method == "batchnorm" else None
    return Stack((64, *[width] * (DEPTH - 1)), outputs=10, bias_variance=0.5, gamma=scale)


def _network(net: str, method: Any, gamma: float, seed: int, image: tuple[int, ...], width: float) -> tuple[Apply, Any]:
    """One of ours in training mode, its BatchNorms' scales times gamma."""
    classes = 10 if image[-1] == 1 else 100
    model = models.create(net, method=method, num_classes=classes, width=width)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image)))

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        return gamma * leaf if getattr(path[-1], "key", "") == "scale" else leaf

    params = jax.tree_util.tree_map_with_path(scaled, variables["params"])
    return from_linen(model, {**variables, "params": params}, train=True, mutable=["batch_stats"])


def _orders(count: int, seed: int) -> np.ndarray:
    """Places of the images of every step, `(epochs, steps, BATCH)`."""
    rng = np.random.default_rng(seed)
    steps = count // BATCH
    return np.stack([rng.permutation(count)[: steps * BATCH].reshape(steps, BATCH) for _ in range(EPOCHS)])


def train(
    apply_fn: Apply, loss: Any, params: Any, groups: Sequence[tuple[float, ...]], seed: int
) -> list[float | None]:
    """Mean loss over the last epoch at each rate, those of a group at once; None where it is not finite."""
    images, labels = digits()

    def step(state: Any, rate: jax.Array, chosen: jax.Array) -> Any:
        params, momentum = state
        value, grads = jax.value_and_grad(lambda p: loss(apply_fn(p, images[chosen]), labels[chosen]))(params)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
        return (jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum), value

    compiled = jax.jit(jax.vmap(step, (0, 0, None)))
    orders, found = _orders(len(images), seed), []
    for rates in groups:
        begin = jax.tree.map(lambda leaf, n=len(rates): jnp.broadcast_to(leaf, (n, *leaf.shape)), params)  # noqa: B008
        state, values = (begin, jax.tree.map(jnp.zeros_like, begin)), []
        for chosen in orders.reshape(-1, BATCH):
            state, value = compiled(state, jnp.asarray(rates), jnp.asarray(chosen))
            values.append(np.asarray(value))
            if not np.isfinite(values[-1]).any():
                break
        last = np.stack(values[-orders.shape[1] :]).mean(0)
        found += [float(value) if np.isfinite(value) else None for value in last]
    return found


def measure_map(net: str, method: str, gamma: float, seed: int, form: str) -> Record:
    """One row of the map."""
    images, labels = digits()
    key, start = jax.random.key(seed), time.process_time()
    bounds: dict[str, float] = {}
    if net == "stack":
        stack = _make_stack(method, gamma, FORMS[form].width)
        apply_fn, params, loss, name = stack.apply, stack.init(key), squared_loss, "squared"
        parts = fisher_bound(stack, PairMoments.of(np.asarray(images).reshape(len(images), 64)))
        bounds = {"bound": float(parts.sum())}
        bounds |= {"last_bound": float(parts[-1])} if method == "batchnorm" else {}
    else:
        apply_fn, params = _network(net, method, gamma, seed, images.shape[1:], FORMS[form].digits)
        loss, name = softmax_loss, "softmax"
    found = curvature.gauss_newton_eigenvalues(apply_fn, params, images[:CURVED], key=key, loss=name)
    # Convolutions under vmap are grouped ones, which are slow on a CPU.
    groups = [RATES] if net == "stack" else [(rate,) for rate in COARSE]
    return {
        "eigenvalue": float(found.values[0]),
        "converged": bool(found.converged),
        **bounds,
        "loss": name,
        "initial_loss": float(loss(apply_fn(params, images[:CURVED]), labels[:CURVED])),
        "rates": [rate for rates in groups for rate in rates],
        "losses": train(apply_fn, loss, params, groups, seed),
        "epochs": EPOCHS,
        "batch": BATCH,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def measure_norms(net: str, where: str, seed: int, form: str, data_dir: str) -> Record:
    """One network with BatchNorm in some places."""
    data, size = read(NETS[net], data_dir), FORMS[form]
    count, width = (CURVED, size.digits) if NETS[net] == "digits" else (size.images, size.photographs)
    images = normalize(jnp.asarray(data.train.images[:count]), data.mean, data.std, jnp.float32)
    key, start = jax.random.key(seed), time.process_time()
    if net == "mlp":
        hidden, last = where in ("hidden layers", "both"), where in ("logits", "both")
        mlp = RandomMLP(64, size.width, DEPTH, 10, normalized=hidden, last_norm=last)
        images, params = images.reshape(count, -1), mlp.init(key)
        apply_fn: Apply = mlp.apply
    else:
        apply_fn, params = _network(net, NORMS[where], 1.0, seed, images.shape[1:], width)
    found = curvature.gauss_newton_eigenvalues(apply_fn, params, images, key=key, loss="squared")
    outputs, backward = jax.vjp(jax.jit(lambda p: apply_fn(p, images)), params)
    signs = [jax.random.rademacher(jax.random.fold_in(key, i), outputs.shape, jnp.float32) for i in range(16)]
    squares = [sum(float((g**2).sum()) for g in jax.tree.leaves(backward(v))) for v in signs]
    return {
        "eigenvalue": float(found.values[0]),
        "converged": bool(found.converged),
        "trace": float(np.mean(squares)) / count,
        "output_variance": float(outputs.var(0).mean()),
        "images": count,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
