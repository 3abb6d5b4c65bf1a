"""Builds a network by name under a method, or says why not."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack

from flax import linen as nn

from mimicnorm_jax.errors import unknown
from mimicnorm_jax.init_schemes import SCHEMES
from mimicnorm_jax.linen.remat import NO_REMAT, REMATS
from mimicnorm_jax.methods import METHODS, Method
from mimicnorm_jax.models.factory import LayerFactory
from mimicnorm_jax.models.registry import ARCHITECTURES


def _choose(field: str, value: str, choices: Iterable[str]) -> None:
    names = list(choices)
    if value not in names:
        raise ValueError(unknown(field, value, names))


def methods_of(name: str) -> list[str]:
    """Names of the methods that make sense for the network `name`."""
    _choose("model", name, ARCHITECTURES)
    return [method.name for method in METHODS.values() if not _objection(name, method)]


def _objection(name: str, method: Method) -> str:
    architecture = ARCHITECTURES[name]
    if method.residual.needs_sums and not architecture.residual_branches:
        return f"{method.name} is about residual branches that end in a convolution, and {name} has none"
    if method.for_binary and not architecture.binary:
        return f"{method.name} is for binary convolutions, and {name} has none"
    if method.residual.for_resnets and not architecture.fixup:
        return f"{method.name}'s rules are written for the branches of ResNets, not for those of {name}"
    return ""


def check_image(name: str, shape: Sequence[int]) -> None:
    """Raises ValueError if the network `name` cannot take images of `shape`, `(H, W, C)`."""
    _choose("model", name, ARCHITECTURES)
    stride = ARCHITECTURES[name].stride
    if min(shape[:2]) < stride:
        raise ValueError(
            f"{name} shrinks images by {stride} and needs at least {stride} x {stride} pixels; "
            f"these have {shape[0]} x {shape[1]}. Use a net with a smaller stride, such as resnet8"
        )


class LayerOptions(TypedDict, total=False):
    """Options of all layers of a network.

    Attributes:
      dtype: of activations; float32.
      param_dtype: of parameters; float32.
      axis_name: mapped axis over which every BatchNorm, or the last, is synchronized; None.
      batch_axis_name: mapped axis over which a batch is spread, with the same dropout key on every device: dropout
        then does not depend on the number of devices, but for that of a run in microbatches; None.
      center_in_call: False leaves centering to `optim.keep_kernels_centered` in the optimizer; True.
      running_variance: convention of the last BatchNorm's running variance, see `LastBatchNorm`; "biased".
      remat: what is recomputed in the backward pass instead of being kept, see `linen.REMATS`, the gradient being
        the same up to rounding; "none".
    """

    dtype: Any
    param_dtype: Any
    axis_name: str | None
    batch_axis_name: str | None
    center_in_call: bool
    running_variance: Literal["biased", "unbiased"]
    remat: str


def create(
    name: str,
    *,
    method: str | Method = "mimicnorm",
    num_classes: int = 100,
    init: str = "published",
    width: float = 1.0,
    **options: Unpack[LayerOptions],
) -> nn.Module:
    """Builds a network under a method: in its CIFAR form for small images, or its ImageNet form.

    The same seed gives every method the same raw kernels, up to the scale that its initialization asks for, Fixup's
    zeros, and an increasing function where a kernel starts uniform: Fixup's stem in `published`, and kernels of
    `published_batchnorm`.

    Args:
      name: one of `ARCHITECTURES`.
      method: one of `METHODS`, see `methods_of`; or a record of your own.
      num_classes: number of logits.
      init: one of `init_schemes.SCHEMES`; `published_batchnorm` needs the method batchnorm.
      width: factor on all channels; the published networks have 1.
      **options: of its layers, such as `dtype`, by keyword: see `LayerOptions`.

    Returns:
      A module with `init(key, images)` and `apply(variables, images, train=...)`, images
      `(B, H, W, C)`, logits `(B, num_classes)`. Training needs `mutable=["batch_stats"]` and VGG
      a `dropout` key.

    Raises:
      ValueError: for an unknown name, or a method or rematerialization that makes no sense for the network or the
        initialization.
      TypeError: for an unknown option.

    Example:
      >>> model = create("resnet18", method="mimicnorm", num_classes=10)
    """
    for option in options.keys() - LayerOptions.__annotations__:
        raise TypeError(unknown("option of a network", option, LayerOptions.__annotations__))
    _choose("model", name, ARCHITECTURES)
    if isinstance(method, str):
        _choose("method", method, METHODS)
        method = METHODS[method]
    _choose("init", init, SCHEMES)
    remat = options.get("remat", NO_REMAT)
    _choose("remat", remat, REMATS)
    _require_sense(name, method, init, remat)
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: classification needs at least 2")
    if width <= 0:
        raise ValueError(f"width is {width}: it is a positive factor on the channels")
    architecture = ARCHITECTURES[name]
    factory = LayerFactory(method, SCHEMES[init], architecture.published, rule=architecture.rule, **options)
    return architecture.build(factory=factory, num_classes=num_classes, width=width)


def _require_sense(name: str, method: Method, init: str, remat: str) -> None:
    if objection := _objection(name, method):
        raise ValueError(f"{objection}. Methods for {name}: {', '.join(methods_of(name))}")
    if method.norm is not None and method.norm.divides_scale and method.residual.scales_convolutions:
        raise ValueError(
            f"method={method.name!r} has {type(method.norm).__name__} behind every convolution, which divides away "
            f"what {type(method.residual).__name__} multiplies their outputs by: leave out one of the two"
        )
    if method.logit_scale != 1.0 and not method.last_batch_norm:
        raise ValueError(
            f"logit_scale is {method.logit_scale:g}, but method={method.name!r} has no norm on the logits to scale: "
            "leave it 1, or choose mimicnorm or lastbn"
        )
    if SCHEMES[init].batch_norm_only and not method.batch_norm:
        raise ValueError(
            f"init={init!r} is what networks with BatchNorm start with, and method={method.name!r} has none between "
            "layers: use init='published'"
        )
    if remat == "cheap" and not (ARCHITECTURES[name].cheap_remat or method.norm is not None):
        raise ValueError(
            f"remat='cheap' recomputes pointwise convolutions that do not narrow, and {name} keeps no output of one: "
            f"choose {NO_REMAT!r} or 'stage'"
        )
