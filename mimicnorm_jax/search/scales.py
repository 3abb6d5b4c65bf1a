"""The scale behind each choice's last convolution: alone trained, and what an architecture is judged by."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from mimicnorm_jax.search.network import Supernet
from mimicnorm_jax.search.space import SearchSpace

State = tuple[Any, optax.OptState]
"""The supernet's variables, and the optimizer's state."""
Step = Callable[[State, jax.Array, jax.Array, jax.Array], tuple[State, jax.Array]]


def is_scale(path: Sequence[Any]) -> bool:
    """Whether a parameter is what a search trains: scale and shift of the norm that ends a choice, or its scalar.

    Args:
      path: names of the parameter, from the top.

    Example:
      >>> is_scale(("layer0", "choices_2", "conv3", "bn", "bias"))
      True
      >>> is_scale(("layer0", "choices_2", "conv3", "conv", "scale")), is_scale(("first", "conv3", "bn", "scale"))
      (True, False)
    """
    ends_choice = len(path) == 5 and path[1].startswith("choices_") and path[2] == "conv3"
    return ends_choice and (path[3] != "conv" or path[4] == "scale")


def scales_only(inner: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """An optimizer of the scales (`is_scale`), with no state for the rest, to which it does nothing at all.

    Args:
      inner: the optimizer.
      params: the supernet's.

    Raises:
      ValueError: if there is none, as under a method without a norm or a scalar behind every choice.
    """
    labels = path_aware_map(lambda path, _: "scales" if is_scale(path) else "frozen", params)
    if "scales" not in jax.tree.leaves(labels):
        raise ValueError(
            "no choice of this network ends in a norm with a scale or in a learnable scalar, so there is nothing to "
            "train or judge it by: take the method batchnorm or mimicnorm"
        )
    return optax.partition({"scales": inner, "frozen": optax.set_to_zero()}, labels)


def published_optimizer(steps: int, batch: int = 512) -> optax.GradientTransformation:
    """SGD as BN-NAS has it: rate 0.25 for a batch of 512, momentum 0.9, weight decay 4e-5; the rate falls to 0.

    Args:
      steps: in all; along a cosine, which is recalled.
      batch: images a step; the rate is proportional to it.
    """
    rate = optax.cosine_decay_schedule(0.25 * batch / 512, steps)
    return optax.chain(optax.add_decayed_weights(4e-5), optax.sgd(rate, momentum=0.9))


def make_step(network: Supernet, optimizer: optax.GradientTransformation, label_smoothing: float = 0.1) -> Step:
    """A training step `(state, images, labels, path) -> (state, loss)`, one program for all paths.

    Args:
      network: all networks of a space. Trained with one path throughout, the parameters of that path go as they
        would in its own network, unless the optimizer joins parameters (as a global norm does).
      optimizer: of the whole tree of parameters, such as `scales_only` makes.
      label_smoothing: of the cross entropy.

    Returns:
      A compiled function; it takes the state's buffers, so that state cannot be used again.
    """

    def loss_of(params: Any, rest: Any, images: jax.Array, labels: jax.Array, path: jax.Array) -> Any:
        variables = {"params": params, **rest}
        logits, rest = network.apply(variables, images, train=True, path=path, mutable=list(rest))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, network.num_classes), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), rest

    def step(state: State, images: jax.Array, labels: jax.Array, path: jax.Array) -> tuple[State, jax.Array]:
        variables, optimizer_state = state
        rest = {name: value for name, value in variables.items() if name != "params"}
        params = variables["params"]
        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params, rest, images, labels, path)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return ({"params": optax.apply_updates(params, updates), **rest}, optimizer_state), loss

    return jax.jit(step, donate_argnums=0)


def scores(params: Any, space: SearchSpace) -> np.ndarray:
    """The mean absolute scale of every choice.

    Args:
      params: of the supernet.
      space: of its choices.

    Returns:
      `(L, K)`, layers and choices.

    Raises:
      ValueError: names a choice without a scale.
    """
    found = np.full((space.num_layers, len(space.choices)), np.nan)
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params)  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        if is_scale(path) and path[-1] == "scale":
            place = int(path[0].removeprefix("layer")), int(path[1].removeprefix("choices_"))
            found[place] = float(jnp.abs(leaf).mean())
    if np.isnan(found).any():
        layer, choice = np.argwhere(np.isnan(found))[0]
        raise ValueError(f"layer {layer}, choice {choice} has no scale behind its last convolution to judge it by")
    return found


def total(table: np.ndarray, path: Sequence[int]) -> float:
    """The sum over layers of what a table `(L, K)` has for the choices of a path: of `scores`, BN-NAS' indicator.

    Example:
      >>> total(np.array([[1.0, 2.0], [3.0, 4.0]]), (1, 0))
      5.0
    """
    return float(table[np.arange(len(table)), np.asarray(path)].sum())
