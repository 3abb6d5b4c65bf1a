"""What BatchNorms see of training batches, without training: a forward pass that reads what they put into averages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval

from mimicnorm_jax.data.pipeline import Batch, Feed, MakeBatch, Resident
from mimicnorm_jax.training.model import head_of, train_option
from mimicnorm_jax.training.step import AXIS, StepConfig, training_inputs


class Observed(NamedTuple):
    """A network that is to see training batches.

    Attributes:
      variables: `params` and `batch_stats`.
      step: before the first batch; augmentation and dropout are those of the training steps from here on.
    """

    variables: dict[str, Any]
    step: Any


def moved_averages(config: StepConfig, variables: dict[str, Any], images: jax.Array, dropout_key: jax.Array) -> Any:
    """Running averages after one batch that started from the given ones, in at least float32.

    A batch is taken in microbatches as training takes it. Where a declared head alone couples the examples, it sees all
    of them; any other BatchNorm sees one microbatch at a time, each starts from the given averages, and the mean of
    what they give is returned.

    Args:
      config: network and microbatches.
      variables: `params` and `batch_stats`.
      images: `(b, H, W, C)`, normalized; b a multiple of `config.microbatches`.
      dropout_key: of this device.

    Returns:
      A tree as `batch_stats`.
    """
    model, parts, stats = config.model, config.microbatches, variables["batch_stats"]

    def moved(images: jax.Array, key: jax.Array) -> Any:
        mode = train_option(model, True)
        _, updated = model.apply(variables, images, mutable=["batch_stats"], rngs={"dropout": key}, **mode)
        return updated["batch_stats"]

    if parts == 1:
        return jax.tree.map(_wide, moved(images, dropout_key))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(parts))
    split_images = images.reshape(parts, -1, *images.shape[1:])
    if (split := head_of(model)) is None:
        found = lax.map(lambda part: moved(*part), (split_images, keys))
        return jax.tree.map(lambda leaf: _wide(leaf).mean(0), found)
    body, head, name = split

    def raw_logits(part: tuple[jax.Array, jax.Array]) -> Any:
        images, key = part
        rngs, mode = {"dropout": key}, train_option(body, True)
        return body.apply({"params": variables["params"]}, images, rngs=rngs, **mode)

    raw: Any = lax.map(raw_logits, (split_images, keys))
    _, updated = head.apply({"batch_stats": stats[name]}, raw.reshape(-1, *raw.shape[2:]), mutable=["batch_stats"])
    return jax.tree.map(_wide, {name: updated["batch_stats"]})


def read_elsewhere(config: StepConfig, variables: dict[str, Any], images: Any, num_devices: int) -> Any:
    """On which running averages more of a forward pass in training may depend than what they themselves become.

    As on the averages of a norm that is frozen, or on what `nn.SpectralNorm` keeps. It is read from the program,
    without computing: what is not read elsewhere is proven not to be.

    Args:
      config, variables, images: as in `moved_averages`; arrays or `jax.ShapeDtypeStruct`s.
      num_devices: that share a batch.

    Returns:
      A tree of booleans as `batch_stats`.
    """

    def moved(stats: Any, params: Any, images: jax.Array, key: jax.Array) -> Any:
        return moved_averages(config, {"params": params, "batch_stats": stats}, images, key)

    stats, key = variables["batch_stats"], jax.eval_shape(jax.random.key, 0)
    program = jax.make_jaxpr(moved, axis_env=[(AXIS, num_devices)])(stats, variables["params"], images, key)
    leaves, tree = jax.tree.flatten(stats)

    def is_read(place: int) -> bool:
        others = [i != place for i in range(len(leaves))]
        return partial_eval.dce_jaxpr(program.jaxpr, others)[1][place]

    return tree.unflatten([is_read(place) for place in range(len(leaves))])


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def sum_of_moved(
    config: StepConfig,
    make_batch: MakeBatch,
    observed: Observed,
    resident: Resident,
    feeds: Feed,
    num_steps: jax.Array,
) -> Any:
    """`moved_averages` of several training batches, each from the given averages, summed.

    Args:
      config: of the run's steps, closed over.
      make_batch: of the pipeline, closed over.
      observed: the network, the same on every device.
      resident, feeds, num_steps: as in `step.train_steps`.

    Returns:
      A tree as `batch_stats`, the same on every device.
    """

    variables, step = observed

    def moved(i: int | jax.Array) -> Any:
        batch: Batch = make_batch(resident, jax.tree.map(lambda leaf: leaf[i], feeds))
        # Unsynchronized BatchNorms differ between devices; the step averages them too.
        return lax.pmean(moved_averages(config, variables, *training_inputs(config, step + i, batch)), AXIS)

    (count,) = {len(leaf) for leaf in jax.tree.leaves(feeds)}
    if count == 1:
        return moved(0)
    start = jax.tree.map(lambda leaf: jnp.zeros_like(_wide(leaf)), variables["batch_stats"])
    return lax.fori_loop(0, num_steps, lambda i, total: jax.tree.map(jnp.add, total, moved(i)), start)
