"""The networks by name: `create` builds any of them under any method that makes sense for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax.errors import unknown
from mimicnorm_jax.functional import kernels
from mimicnorm_jax.init_schemes import SCHEMES, PublishedInit, he_fan_in, he_fan_out, he_ungrouped, pytorch_default
from mimicnorm_jax.linen.remat import NO_REMAT, REMATS
from mimicnorm_jax.methods import METHODS, Method
from mimicnorm_jax.models.factory import LayerFactory
from mimicnorm_jax.models.mobilenet import MobileNetV2
from mimicnorm_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from mimicnorm_jax.models.shufflenet import CHANNELS, ShuffleNetV2
from mimicnorm_jax.models.squeezenet import SqueezeNet
from mimicnorm_jax.models.vgg import STAGES, VGG


@dataclass(frozen=True)
class Architecture:
    """What `create` knows of one network.

    Attributes:
      build: its module, but for the factory, the number of classes and the width.
      published: the constants of its published initialization.
      stride: by how much it shrinks an image in all, so the least height and width it takes.
      residual_branches: whether it has residual branches that end in one convolution.
      fixup: whether Fixup's rules are written for its branches.
      rule: which kernels the published code centers.
      cheap_remat: whether pointwise convolutions that do not narrow give maps that `remat="cheap"` need not keep.
    """

    build: Callable[..., nn.Module]
    published: PublishedInit
    stride: int
    residual_branches: bool = False
    fixup: bool = False
    rule: kernels.Rule = kernels.PUBLISHED_CIFAR_RULE
    cheap_remat: bool = False


def _resnet(block: Any, *stages: int, channels: int = 64, imagenet: bool = False) -> Architecture:
    return Architecture(
        partial(ResNet, block=block, stages=stages, channels=channels, imagenet=imagenet),
        PublishedInit(2.0, batch_norm=he_fan_out if imagenet else pytorch_default, untouched_dense=True),
        2 ** (len(stages) - 1) * (4 if imagenet else 1),
        residual_branches=True,
        fixup=True,
        rule=kernels.ungrouped if imagenet else kernels.PUBLISHED_CIFAR_RULE,
        cheap_remat=block is Bottleneck,
    )


ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"vgg{depth}": Architecture(partial(VGG, stages=stages), PublishedInit(2.8, keep_conv_bias=True), 32)
        for depth, stages in STAGES.items()
    },
    "resnet8": _resnet(BasicBlock, 1, 1, 1, channels=16),
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(Bottleneck, 3, 4, 23, 3),
    "resnet152": _resnet(Bottleneck, 3, 8, 36, 3),
    "resnet18_imagenet": _resnet(BasicBlock, 2, 2, 2, 2, imagenet=True),
    "resnet50_imagenet": _resnet(Bottleneck, 3, 4, 6, 3, imagenet=True),
    "resnet101_imagenet": _resnet(Bottleneck, 3, 4, 23, 3, imagenet=True),
    "squeezenet": Architecture(
        SqueezeNet, PublishedInit(2.8, min_channels=4, keep_conv_bias=True, batch_norm=he_fan_in), 8, cheap_remat=True
    ),
    **{
        f"shufflenetv2_{width}": Architecture(
            partial(ShuffleNetV2, channels=channels),
            PublishedInit(2.0, 4, keep_conv_bias=True, batch_norm=he_ungrouped, untouched_dense=True),
            8,
            cheap_remat=True,
        )
        for width, channels in CHANNELS.items()
    },
    "mobilenetv2": Architecture(
        MobileNetV2,
        PublishedInit(2.0, 2, keep_conv_bias=True, batch_norm=he_ungrouped),
        8,
        residual_branches=True,
        cheap_remat=True,
    ),
}
"""Every network by name. `resnet8` is the small one of the digits default; it is in no paper's table."""


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
    if method.needs_residual_branches and not architecture.residual_branches:
        return f"{method.name} is about residual branches that end in a convolution, and {name} has none"
    if method.fixup and not architecture.fixup:
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


def create(
    name: str,
    *,
    method: str = "mimicnorm",
    num_classes: int = 100,
    init: str = "published",
    width: float = 1.0,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    axis_name: str | None = None,
    batch_axis_name: str | None = None,
    center_in_call: bool = True,
    running_variance: Literal["biased", "unbiased"] = "biased",
    remat: str = NO_REMAT,
) -> nn.Module:
    """Builds a network under a method: in its CIFAR form for small images, or its ImageNet form.

    The same seed gives every method the same raw kernels, up to the scale that its initialization asks for, Fixup's
    zeros, and an increasing function where a kernel starts uniform: Fixup's stem in `published`, and kernels of
    `published_batchnorm`.

    Args:
      name: one of `ARCHITECTURES`.
      method: one of `METHODS`, see `methods_of`.
      num_classes: number of logits.
      init: one of `initialization.SCHEMES`; `published_batchnorm` needs the method batchnorm.
      width: factor on all channels; the published networks have 1.
      dtype: of activations.
      param_dtype: of parameters.
      axis_name: mapped axis over which every BatchNorm, or the last, is synchronized.
      batch_axis_name: mapped axis over which a batch is spread, with the same dropout key on every device: dropout
        then does not depend on the number of devices.
      center_in_call: False leaves centering to `centering.keep_kernels_centered` in the optimizer.
      running_variance: convention of the last BatchNorm's running variance, see `LastBatchNorm`.
      remat: what is recomputed in the backward pass instead of being kept, see `remat.REMATS`; the gradient stays
        the same up to rounding.

    Returns:
      A module with `init(key, images)` and `apply(variables, images, train=...)`, images
      `(B, H, W, C)`, logits `(B, num_classes)`. Training needs `mutable=["batch_stats"]` and VGG
      a `dropout` key.

    Raises:
      ValueError: for an unknown name, or a method or rematerialization that makes no sense for the network or the
        initialization.

    Example:
      >>> model = create("resnet18", method="mimicnorm", num_classes=10)
    """
    _choose("model", name, ARCHITECTURES)
    _choose("method", method, METHODS)
    _choose("init", init, SCHEMES)
    if objection := _objection(name, METHODS[method]):
        raise ValueError(f"{objection}. Methods for {name}: {', '.join(methods_of(name))}")
    if SCHEMES[init].batch_norm_only and not METHODS[method].batch_norm:
        raise ValueError(
            f"init={init!r} is what networks with BatchNorm start with, and method={method!r} has none between layers: "
            "use init='published'"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: classification needs at least 2")
    if width <= 0:
        raise ValueError(f"width is {width}: it is a positive factor on the channels")
    _choose("remat", remat, REMATS)
    architecture = ARCHITECTURES[name]
    if remat == "cheap" and not (architecture.cheap_remat or METHODS[method].batch_norm):
        raise ValueError(
            f"remat='cheap' recomputes pointwise convolutions that do not narrow, and {name} keeps no output of one: "
            f"choose {NO_REMAT!r} or 'stage'"
        )
    factory = LayerFactory(
        METHODS[method],
        SCHEMES[init],
        architecture.published,
        rule=architecture.rule,
        dtype=dtype,
        param_dtype=param_dtype,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        center_in_call=center_in_call,
        running_variance=running_variance,
        remat=remat,
    )
    return architecture.build(factory=factory, num_classes=num_classes, width=width)
