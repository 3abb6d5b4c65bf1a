"""What training asks of a network: a Flax module that maps images to logits, from this package or your own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax.data.specs import DatasetSpec
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.linen.last_norm import call_signature
from mimicnorm_jax.models.head import HasHead, SplitNetwork

AXIS = "batch"
"""Name of the mapped axis, over which a batch is spread."""
KEPT = {"params", "batch_stats"}
"""The collections of variables that a run keeps."""


def train_option(model: Any, train: bool) -> dict[str, Any]:
    """`train=` for a network that takes it, nothing for one that does not."""
    return {"train": train} if "train" in call_signature(model).parameters else {}


def at_least_float32(logits: jax.Array) -> jax.Array:
    """Logits in a precision to which losses and their sums can be left."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def eval_logits(model: Any, variables: Any, images: jax.Array) -> jax.Array:
    """Logits `(B, classes)` of images `(B, H, W, C)` in evaluation, in at least float32."""
    return at_least_float32(model.apply(variables, images, **train_option(model, False)))


def init_variables(model: Any, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
    """A network's fresh variables for images of `(H, W, C)`, compiled as one program."""
    return jax.jit(lambda key, images: model.init(key, images, **train_option(model, False)))(
        key, jnp.zeros((1, *image_shape))
    )


def head_of(model: Any) -> SplitNetwork | None:
    """The network in two parts, if it declares a head that alone couples the examples of a batch."""
    return model.split_head() if isinstance(model, HasHead) else None


def is_exact_in_parts(model: Any, batch_stats: Any) -> bool:
    """Whether microbatches give the whole batch's gradient: examples meet in a declared head alone, or nowhere."""
    return head_of(model) is not None or not jax.tree.leaves(batch_stats)


def require_trainable(model: nn.Module, dataset: DatasetSpec, dtype: Any) -> None:
    """Refuses a module that the steps would not train as it is meant to be, without compiling anything.

    Args:
      model: `model.init(key, images)` and `model.apply(variables, images)` are called, with `train=` if it takes it.
      dataset: gives the images' shape and the number of classes.
      dtype: of the images.

    Raises:
      ConfigError: says what is in the way.
    """
    name = type(model).__name__
    _, *others = call_signature(model).parameters
    if foreign := [other for other in others if other != "train"]:
        raise ConfigError(
            f"the network {name} takes {', '.join(foreign)} besides images: a step gives it images and train= alone. "
            f"Wrap it in a module whose __call__ takes (images, train)"
        )
    key = jax.random.key(0)

    def init_and_train(images: jax.Array) -> tuple[Any, jax.Array]:
        variables = model.init(key, images, **train_option(model, False))
        rngs, options = {"dropout": key}, train_option(model, True)
        return variables, model.apply(variables, images, mutable=["batch_stats"], rngs=rngs, **options)[0]

    images = jax.ShapeDtypeStruct((1, 2, *dataset.image_shape), dtype)
    try:
        variables, logits = jax.eval_shape(jax.vmap(init_and_train, axis_name=AXIS), images)
    except Exception as error:  # whatever a module raises
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"the network {name} does not take images {images.shape[1:]}: {text}") from error
    if foreign := sorted(variables.keys() - KEPT):
        raise ConfigError(
            f"the network {name} has variables in the collection {foreign[0]!r}, which no step would keep: "
            f"there are {' and '.join(sorted(KEPT))}"
        )
    if logits.shape[1:] != (2, dataset.num_classes):
        raise ConfigError(
            f"the network {name} maps 2 images to an array of shape {logits.shape[1:]}: {dataset.name} needs logits "
            f"(2, {dataset.num_classes})"
        )
