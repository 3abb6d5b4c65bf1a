"""Every network by name, with what `create` knows of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flax import linen as nn

from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule, ungrouped
from mimicnorm_jax.init_schemes import PublishedInit, he_fan_in, he_fan_out, he_ungrouped, pytorch_default
from mimicnorm_jax.models import seresnet
from mimicnorm_jax.models.densenet import BLOCKS, DenseNet
from mimicnorm_jax.models.mobilenet import MobileNetV2
from mimicnorm_jax.models.reactnet import ReActNet, ReActNetA
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
      binary: whether its convolutions read signs of their input.
      cheap_remat: whether pointwise convolutions that do not narrow give maps that `remat="cheap"` need not keep.
    """

    build: Callable[..., nn.Module]
    published: PublishedInit
    stride: int
    residual_branches: bool = False
    fixup: bool = False
    rule: Rule = PUBLISHED_CIFAR_RULE
    binary: bool = False
    cheap_remat: bool = False


def _resnet(block: Any, *stages: int, channels: int = 64, imagenet: bool = False) -> Architecture:
    return Architecture(
        partial(ResNet, block=block, stages=stages, channels=channels, imagenet=imagenet),
        PublishedInit(2.0, batch_norm=he_fan_out if imagenet else pytorch_default, untouched_dense=True),
        2 ** (len(stages) - 1) * (4 if imagenet else 1),
        residual_branches=True,
        fixup=True,
        rule=ungrouped if imagenet else PUBLISHED_CIFAR_RULE,
        cheap_remat=block is Bottleneck,
    )


def _seresnet(block: Any, *stages: int) -> Architecture:
    return Architecture(
        partial(seresnet.SEResNet, block=block, stages=stages),
        PublishedInit(2.0, keep_conv_bias=True),
        8,
        cheap_remat=block is seresnet.Bottleneck,
    )


def _shufflenet(channels: tuple[int, int, int, int], *, imagenet: bool = False) -> Architecture:
    return Architecture(
        partial(ShuffleNetV2, channels=channels, imagenet=imagenet),
        PublishedInit(
            2.0,
            min_channels=4,
            keep_conv_bias=not imagenet,
            batch_norm=pytorch_default if imagenet else he_ungrouped,
            untouched_dense=True,
            scalar_rule=ungrouped,
        ),
        32 if imagenet else 8,
        rule=ungrouped if imagenet else PUBLISHED_CIFAR_RULE,
        cheap_remat=True,
    )


def _reactnets(name: str, build: Callable[..., nn.Module], stride: int) -> dict[str, Architecture]:
    """A binary network, and its first step of training: the same parameters, read as they are by its convolutions."""
    # Signs have energy 1, so variance 1/n keeps that of a convolution's input.
    known = Architecture(build, PublishedInit(1.0), stride, residual_branches=True, binary=True)
    return {name: known, f"{name}_step1": replace(known, build=partial(build, binary_kernels=False))}


ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"vgg{depth}": Architecture(partial(VGG, stages=stages), PublishedInit(2.8, keep_conv_bias=True), 32)
        for depth, stages in STAGES.items()
    },
    **{
        f"vgg{depth}_imagenet": Architecture(
            partial(VGG, stages=STAGES[depth]),
            PublishedInit(2.8, fan_out=True, keep_conv_bias=True),
            32,
            rule=ungrouped,
        )
        for depth in (11, 16, 19)
    },
    "resnet8": _resnet(BasicBlock, 1, 1, 1, channels=16),
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(Bottleneck, 3, 4, 23, 3),
    "resnet152": _resnet(Bottleneck, 3, 8, 36, 3),
    "resnet18_imagenet": _resnet(BasicBlock, 2, 2, 2, 2, imagenet=True),
    "resnet34_imagenet": _resnet(BasicBlock, 3, 4, 6, 3, imagenet=True),
    "resnet50_imagenet": _resnet(Bottleneck, 3, 4, 6, 3, imagenet=True),
    "resnet101_imagenet": _resnet(Bottleneck, 3, 4, 23, 3, imagenet=True),
    "resnet152_imagenet": _resnet(Bottleneck, 3, 8, 36, 3, imagenet=True),
    "seresnet18": _seresnet(seresnet.BasicBlock, 2, 2, 2, 2),
    "seresnet34": _seresnet(seresnet.BasicBlock, 3, 4, 6, 3),
    "seresnet50": _seresnet(seresnet.Bottleneck, 3, 4, 6, 3),
    "seresnet101": _seresnet(seresnet.Bottleneck, 3, 4, 23, 3),
    "seresnet152": _seresnet(seresnet.Bottleneck, 3, 8, 36, 3),
    **{
        f"densenet{depth}": Architecture(
            partial(DenseNet, growth=growth, blocks=blocks),
            PublishedInit(1.0, batch_norm=pytorch_default, untouched_dense=True),
            8,
        )
        for depth, (growth, blocks) in BLOCKS.items()
    },
    "squeezenet": Architecture(
        SqueezeNet, PublishedInit(2.8, min_channels=4, keep_conv_bias=True, batch_norm=he_fan_in), 8, cheap_remat=True
    ),
    **{f"shufflenetv2_{width}": _shufflenet(channels) for width, channels in CHANNELS.items()},
    **{f"shufflenetv2_{width}_imagenet": _shufflenet(channels, imagenet=True) for width, channels in CHANNELS.items()},
    "mobilenetv2": Architecture(
        MobileNetV2,
        PublishedInit(2.0, 2, keep_conv_bias=True, batch_norm=he_ungrouped, scalar_rule=ungrouped),
        8,
        residual_branches=True,
        cheap_remat=True,
    ),
    **_reactnets("reactnet8", partial(ReActNet, stages=(2, 2, 2), channels=16), 4),
    **_reactnets("reactnet18", partial(ReActNet, stages=(4, 4, 4, 4)), 8),
    **_reactnets("reactnet_a_imagenet", ReActNetA, 32),
}
"""Every network by name. `resnet8` and `reactnet8` are small ones, in no paper's table."""
