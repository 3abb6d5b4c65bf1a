"""What every convolution and dense layer of a network computes in evaluation: one kernel and one bias."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from mimicnorm_jax.errors import FoldError
from mimicnorm_jax.linen.conv import TransformedKernel
from mimicnorm_jax.linen.dynamic_tanh import DynamicTanh
from mimicnorm_jax.linen.interception import intercept, observe
from mimicnorm_jax.linen.norm import LastBatchNorm
from mimicnorm_jax.linen.scalars import ScalarBias
from mimicnorm_jax.methods import Activation

Path = tuple[str, ...]
Shape = tuple[int, int, int]
CONV = "conv"
"""What a `ConvNorm` calls its convolution."""
CLASSIFIER: tuple[Path, ...] = (("classifier",), ("classifier", CONV))
"""The layer of the logits, dense or a convolution."""
_IMAGES: tuple[Shape, ...] = ((32, 32, 3), (224, 224, 3), (32, 32, 1), (224, 224, 1))
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm, nn.SpectralNorm, nn.WeightNorm)


class Affine(NamedTuple):
    """A layer in evaluation: everything between its input and the next nonlinearity.

    Attributes:
      kernel: `(*window, n_in / groups, n_out)` or `(n_in, n_out)`.
      bias: `(n_out,)`.
    """

    kernel: jax.Array
    bias: jax.Array

    def scaled(self, factor: jax.Array) -> "Affine":
        """With the output times `factor`, `()` or `(n_out,)`."""
        wide = jnp.broadcast_to(factor, self.bias.shape)
        return Affine(self.kernel * wide.reshape((1,) * (self.kernel.ndim - 1) + wide.shape), self.bias * wide)

    def shifted(self, by: jax.Array) -> "Affine":
        """With `by` added to the output, `()` or `(n_out,)`."""
        return Affine(self.kernel, self.bias + jnp.broadcast_to(by, self.bias.shape))


class Network(NamedTuple):
    """A network in evaluation.

    Attributes:
      layers: by path, in the order of their calls.
      relu6: whether it has ReLU6.
    """

    layers: dict[Path, Affine]
    relu6: bool


@dataclass(frozen=True)
class _Witness:
    """An activation that notes whether it is asked for ReLU6."""

    activation: Activation
    asked: list[bool] = field(default_factory=list, compare=False)

    def relu6(self, x: jax.Array) -> jax.Array:
        self.asked.append(True)
        return self.activation.relu6(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.activation, name)


def with_method(model: Any, **changes: Any) -> Any:
    """The network with other fields of its method's record."""
    return model.clone(factory=replace(model.factory, method=replace(model.factory.method, **changes)))


def image_shape_of(model: nn.Module, variables: Any, given: Shape | None) -> Shape:
    """The images that a network with these variables takes, `(H, W, C)`: as given, or the first usual one that fits.

    Raises:
      FoldError: if the variables are not the network's, or for none of these images; for a norm that uses statistics
        of the images themselves, or is no affine map.
    """
    said = ""

    def evaluate(variables: Any, images: jax.Array) -> Any:
        with intercept(_refuse_unfoldable, "refuse unfoldable"):
            return model.apply(variables, images)

    for shape in [given] if given is not None else _IMAGES:
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        try:
            jax.eval_shape(evaluate, variables, images)
        except FoldError:
            raise
        except Exception as error:  # whatever Flax and JAX raise for variables of other shapes
            said = said or " ".join(str(error).split())[:200]
        else:
            return shape
    tried = given or ", ".join(map(str, _IMAGES))
    raise FoldError(
        f"the variables are not those of this {type(model).__name__} for images {tried}: give image_shape=(H, W, C), "
        f"or the model that they belong to ({said})"
    )


def read_affine(model: Any, variables: Mapping[str, Any], image_shape: Shape) -> Network:
    """Every layer of a network in evaluation, with all that its method puts around it.

    Args:
      model: of this package, or one whose layers come from a `LayerFactory` as theirs do.
      variables: `params` and, where there are norms, `batch_stats`.
      image_shape: `(H, W, C)`.

    Raises:
      FoldError: names the norm that no layer can take.
    """
    witness = _Witness(model.factory.method.activation)
    model = with_method(model, activation=witness)
    model = model.clone(factory=replace(model.factory, remat="none"))
    paths: list[Path] = []

    def layers(variables: Any) -> list[Affine]:
        reader = _Reader(variables)
        with observe(reader.note):
            model.apply(variables, jnp.zeros((1, *image_shape)))
        found = reader.layers()
        paths[:] = found
        return list(found.values())

    found = jax.jit(layers)(variables)
    return Network(dict(zip(paths, found, strict=True)), bool(witness.asked))


def _refuse_unfoldable(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Raises FoldError for what stands in a norm's place and no kernel can hold; an interceptor."""
    module, path = context.module, "/".join(context.module.path)
    if isinstance(module, nn.BatchNorm | LastBatchNorm) and context.method_name == "__call__":
        if not kwargs.get("use_running_average", module.use_running_average):
            raise FoldError(
                f"{path} is in training mode and normalizes with the statistics of each batch, which no kernel can "
                "hold: have it use its running averages where train=False"
            )
    elif isinstance(module, _OTHER_NORMS):
        raise FoldError(
            f"{path} is a {type(module).__name__}, which normalizes by statistics of its own in evaluation too: no "
            "kernel can hold them"
        )
    elif isinstance(module, DynamicTanh):
        raise FoldError(
            f"{path} is a DynamicTanh, which is no affine map: no kernel can hold it, and the convolutions around it "
            "are plain already. Use the network as it is (mimicnorm export --no-fold)"
        )
    return call(*args, **kwargs)


class _Reader:
    """Notes the calls of a network's modules, and says afterwards what its layers are.

    Afterwards, since what is computed within a rematerialized part cannot be had outside of it.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._leaves: dict[Path, Any] = flatten_dict(dict(variables))
        self._calls: list[tuple[Any, Path, jax.Array | None]] = []
        self._found: dict[Path, Affine] = {}

    def note(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        module: Any = context.module
        if context.method_name == "__call__":
            scale = args[1] if isinstance(module, TransformedKernel) and len(args) > 1 else kwargs.get("scale")
            self._calls.append((module, module.path, scale))
        return result

    def layers(self) -> dict[Path, Affine]:
        """By path, in the order of their calls."""
        for module, path, scale in self._calls:
            before = (*path[:-1], CONV)
            if isinstance(module, TransformedKernel):
                self._found[path] = self._layer(module, path, scale)
            elif isinstance(module, LastBatchNorm):
                self._normalize(module, path, next((one for one in CLASSIFIER if one in self._found), before))
            elif isinstance(module, nn.BatchNorm):
                self._normalize(module, path, before)
            elif isinstance(module, ScalarBias) and before in self._found:
                self._found[before] = self._found[before].shifted(self._leaf("params", path, "bias"))
        return self._found

    def _leaf(self, collection: str, path: Path, name: str) -> jax.Array:
        leaf = self._leaves[collection, *path, name]
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    def _layer(self, module: Any, path: Path, scale: jax.Array | None) -> Affine:
        kernel = self._leaf("params", path, "kernel")
        kernel = module.kernel_transform(kernel, getattr(module, "feature_group_count", 1))
        bias = self._leaf("params", path, "bias") if module.use_bias else jnp.zeros(kernel.shape[-1], kernel.dtype)
        own = None if module.scale_init is None else self._leaf("params", path, "scale")
        layer = Affine(kernel, bias)
        for one in (own, scale):
            layer = layer if one is None else layer.scaled(one)
        return layer

    def _normalize(self, norm: Any, path: Path, before: Path) -> None:
        if before not in self._found:
            raise FoldError(
                f"{'/'.join(path)} is a {type(norm).__name__} behind no convolution of its own, as in front of a ReLU "
                "that reads several: no kernel can take it"
            )
        mean, var = (self._leaf("batch_stats", path, name) for name in ("mean", "var"))
        factor = jax.lax.rsqrt(var + norm.epsilon)
        if isinstance(norm, LastBatchNorm):
            factor = factor * norm.scale
        elif norm.use_scale:
            factor = factor * self._leaf("params", path, "scale")
        layer = self._found[before].shifted(-mean).scaled(factor)
        if getattr(norm, "use_bias", False):
            layer = layer.shifted(self._leaf("params", path, "bias"))
        self._found[before] = layer
