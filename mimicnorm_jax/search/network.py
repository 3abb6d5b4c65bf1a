"""All networks of a space in one: each layer holds the block of every choice, and a path says which are read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from mimicnorm_jax import models
from mimicnorm_jax.methods import Method
from mimicnorm_jax.models import ConvNorm, LayerFactory
from mimicnorm_jax.models.head import LastBatchNormHead
from mimicnorm_jax.models.mobilenet import InvertedResidual, classify
from mimicnorm_jax.search.space import Layer, Path, SearchSpace


class ChoiceLayer(nn.Module):
    """A block for every choice, of which one is computed.

    Attributes:
      factory: says what the method has.
      space: of the choices.
      layer: which of its layers.
    """

    factory: LayerFactory
    space: SearchSpace
    layer: Layer

    def setup(self) -> None:
        _, features, strides, number, sums = self.layer
        self.choices = [
            InvertedResidual(
                self.factory,
                features,
                expansion,
                strides,
                number,
                sums,
                window=window,
                blocks=self.space.num_layers + 1,
            )
            for window, expansion in self.space.choices
        ]

    def __call__(self, x: jax.Array, choice: int | jax.Array, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` by one block; an array `()` of int32 leaves all in the program, an int only its own."""
        if not isinstance(choice, jax.Array):
            return self.choices[choice](x, train)
        if self.is_initializing():
            for block in self.choices:
                block(x, train)

        def branch(number: int) -> Any:
            return lambda module, x: module.choices[number](x, train)

        return nn.switch(choice, [branch(number) for number in range(len(self.choices))], self, x)


class Supernet(LastBatchNormHead, nn.Module):
    """A network of a search space: all of them, or one with its `architecture`.

    The parameters of one are among those of all, under the same names (`of_path`), and start the same.

    Attributes:
      factory: makes the layers.
      space: of the choices.
      num_classes: number of logits.
      architecture: the choice of every layer; None for a path that is given with every call.
    """

    factory: LayerFactory
    space: SearchSpace
    num_classes: int
    architecture: Path | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, path: jax.Array | None = None) -> jax.Array:
        """Maps images to logits.

        Args:
          x: `(B, H, W, C)`.
          train: as everywhere.
          path: `(L,)`, integers: the choice of every layer, in a network without an architecture. It is data, so
            another path needs no other program. A number out of range is clipped, as `lax.switch` does.

        Returns:
          `(B, num_classes)`.

        Raises:
          ValueError: if the network has no architecture and no path is given, or has one and a path is given; if
            that is not of the space, where its numbers are known.
        """
        choices = self._choices(path)
        factory, space = self.factory, self.space
        x = factory.relu6(ConvNorm(factory, space.stem, 3, bias=factory.rule, name="stem")(x, train))
        number = 1 if space.first == space.stem else None
        x = InvertedResidual(factory, space.first, 1, 1, number, 0, blocks=space.num_layers + 1, name="first")(x, train)
        for place, layer in enumerate(space.layers):
            x = ChoiceLayer(factory, space, layer, name=f"layer{place}")(x, choices[place], train)
        return classify(factory, x, space.last, self.num_classes, train)

    def _choices(self, path: jax.Array | None) -> Path | jax.Array:
        if self.architecture is not None:
            if path is not None:
                raise ValueError(f"path={path}: this network is of the architecture {self.architecture} alone")
            return self.space.check(self.architecture)
        if path is None:
            raise ValueError(
                "a supernet takes the path of every call: give path=, or make the network of one with "
                "clone(architecture=path)"
            )
        if jnp.shape(path) != (self.space.num_layers,):
            raise ValueError(f"path has the shape {jnp.shape(path)}, and the space {self.space.num_layers} layers")
        if not isinstance(path, Tracer):
            self.space.check(np.asarray(path).tolist())
        return jnp.asarray(path, jnp.int32)


def supernet(space: SearchSpace, *, method: str | Method = "batchnorm", num_classes: int) -> Supernet:
    """All networks of a space in one, under a method that makes sense for MobileNetV2.

    Args:
      space: of the choices.
      method: one of `models.methods_of("mobilenetv2")`, or a record of your own.
      num_classes: number of logits.

    Returns:
      A module; `clone(architecture=...)` makes one of its networks of it.

    Raises:
      ValueError: for a method that makes no sense, or too few classes.

    Example:
      >>> from mimicnorm_jax.search import SMALL
      >>> one = supernet(SMALL, method="mimicnorm", num_classes=10).clone(architecture=(0, 5, 3, 3, 1, 2))
    """
    like: Any = models.create("mobilenetv2", method=method, num_classes=num_classes)
    return Supernet(like.factory, space, num_classes)


def of_path(variables: Any, path: Sequence[int]) -> Any:
    """The variables of one network among those of all, for `supernet.clone(architecture=path)`.

    Args:
      variables: what the supernet's `init` gives, or a collection of it; no array is copied.
      path: the choice of every layer.

    Raises:
      ValueError: for a choice that a layer does not have, and a path of another number of layers.
    """
    layers = set(_layers(variables))
    if layers and layers != set(range(len(path))):
        raise ValueError(f"path={tuple(path)} is of {len(path)} layers, and the network has {max(layers) + 1}")
    return _chosen(variables, path)


def _number(name: str) -> int | None:
    number = name.removeprefix("layer")
    return int(number) if number != name and number.isdecimal() else None


def _layers(variables: Any) -> Iterator[int]:
    if isinstance(variables, Mapping):
        for name, value in variables.items():
            number = _number(name)
            yield from _layers(value) if number is None else (number,)


def _chosen(variables: Any, path: Sequence[int]) -> Any:
    if not isinstance(variables, Mapping):
        return variables
    chosen = {}
    for name, value in variables.items():
        if (number := _number(name)) is not None:
            only = f"choices_{path[number]}"
            if only not in value:
                there = ", ".join(sorted(value))
                raise ValueError(f"the path chooses {path[number]} in {name}, which has {there}")
            value = {only: value[only]}
        chosen[name] = _chosen(value, path)
    return {name: value for name, value in chosen.items() if not (isinstance(value, Mapping) and not value)}
