"""How PyTorch code names a network's modules: one small record of rules a family of architectures."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mimicnorm_jax.errors import StateDictError
from mimicnorm_jax.functional.rules import ungrouped
from mimicnorm_jax.linen.last_norm import LAST_BN
from mimicnorm_jax.methods import BatchNorm, Fixup, GainScalars, Method
from mimicnorm_jax.models import mobilenet, seresnet
from mimicnorm_jax.models.densenet import DenseNet
from mimicnorm_jax.models.factory import scale_width
from mimicnorm_jax.models.mobilenet import MobileNetV2
from mimicnorm_jax.models.resnet import ResNet
from mimicnorm_jax.models.seresnet import SEResNet
from mimicnorm_jax.models.shufflenet import ShuffleNetV2
from mimicnorm_jax.models.squeezenet import SqueezeNet
from mimicnorm_jax.models.vgg import CHANNELS, STAGES, VGG


@dataclass(frozen=True)
class Rules:
    """Names of a family. `{}` in a name there stands for the block's.

    Attributes:
      chains: by name of an `nn.Sequential` there, what it holds in order: our layers' names; `bn`, which has a place
        under methods with BatchNorm, and `scale`, which has one under methods with scalars, of the layer before; and
        anything else, which has a place and no parameters.
      names: of what stands outside of such chains: a module's there by path of ours, or a scalar's by its whole path.
      blocks: pattern of our blocks' names, with groups for their numbers.
      block: maps those numbers to the block's name there.
      image_shape: that the network was published for, `(H, W, C)`.
      flattened: the dense layer that reads a flattened map, and the map's channels: PyTorch's order is C, H, W.
      unused: parameters there that the network does not use, of one number each.
    """

    chains: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    blocks: str = r"stage(\d+)_block(\d+)"
    block: Callable[..., str] = "{}.{}".format
    image_shape: tuple[int, int, int] = (32, 32, 3)
    flattened: tuple[str, int] = ("", 0)
    unused: tuple[str, ...] = ()

    def modules(self, method: Method) -> dict[str, str]:
        """Names there by path of ours, of modules and of scalars; `{}` in a name, and first in its path, is a block."""
        found = {_inside(name) + path: name for path, name in self.names.items()}
        for chain, held in self.chains.items():
            place, layer = 0, ""
            for element in held.split():
                if element == "bn":
                    found[f"{layer}/bn"] = f"{chain}.{place}"
                    place += method.norm is not None
                elif element == "scale":
                    found[f"{layer}/conv/scale"] = f"{chain}.{place}.scale"
                    place += isinstance(method.residual, GainScalars)
                else:
                    layer = _inside(chain) + element
                    found[f"{layer}/conv"] = found[layer] = f"{chain}.{place}"
                    place += 1
        return found

    def pixels(self, layer: str, shape: tuple[int, ...]) -> int:
        """Of the map whose flattening a layer's kernel of `shape` reads; 1 where it reads none."""
        flattened, channels = self.flattened
        return shape[0] // channels if layer == flattened and len(shape) == 2 else 1

    def split(self, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """The name there of the block that a path of ours begins with, or nothing, and the path with `{}` for it."""
        match = re.fullmatch(self.blocks, path[0])
        return (self.block(*map(int, match.groups())), ("{}", *path[1:])) if match else ("", path)


def _inside(name: str) -> str:
    return "{}/" if "{}" in name else ""


def _vgg(net: Any) -> Rules:
    """The names of torchvision, too, for the ImageNet form, whose factory alone centers every kernel."""
    imagenet = net.factory.rule is ungrouped
    method: Method = net.factory.method
    # Two networks of CIFAR with neither norm are numbered as if BatchNorms were in them.
    numbered = net.stages in (STAGES[13], STAGES[19]) and not imagenet and method.norm is method.last_norm is None
    norm = "place" if numbered else "bn"
    layers = ""
    for stage, repeats in enumerate(net.stages, 1):
        layers += "".join(f" stage{stage}_conv{i + 1} {norm} relu" for i in range(repeats)) + " pool"
    head = "dense1 relu dropout dense2 relu dropout classifier last_bn"
    return Rules(
        {"features": layers, "classifier": head},
        image_shape=(224, 224, 3) if imagenet else (32, 32, 3),
        flattened=("dense1", scale_width(CHANNELS[-1], net.width)),
    )


def _resnet(net: Any) -> Rules:
    if isinstance(net.factory.method.residual, Fixup):
        return _fixup_resnet(net)
    if net.imagenet:
        return _imagenet_resnet()
    return Rules(
        chains={
            "conv1": "stem bn relu",
            "{}.residual_function": "conv1 bn relu conv2 bn relu conv3 bn",
            "{}.shortcut": "shortcut bn",
        },
        names={
            "conv2/conv/scale": "{}.scale",
            "conv3/conv/scale": "{}.scale",
            "classifier": "fc",
            LAST_BN: "lastbn",
        },
        block=lambda stage, block: f"conv{stage + 1}_x.{block - 1}",
        unused=("bias1",) if isinstance(net.factory.method.residual, GainScalars) else (),
    )


def _imagenet_resnet() -> Rules:
    """The names of torchvision, too."""
    names = {"stem/conv": "conv1", "stem/bn": "bn1", "classifier": "fc", LAST_BN: "lastbn"}
    for i in (1, 2, 3):
        names |= {f"conv{i}/conv": f"{{}}.conv{i}", f"conv{i}/bn": f"{{}}.bn{i}"}
        names[f"conv{i}/conv/scale"] = "{}.scalelayer.scale"
    chains = {"{}.downsample": "shortcut bn scale"}
    return Rules(chains, names, block=_torchvision_block, image_shape=(224, 224, 3))


def _fixup_resnet(net: Any) -> Rules:
    if net.imagenet:
        raise StateDictError("no published PyTorch network is an ImageNet ResNet under fixup: its names are not known")
    names = {"stem/conv": "conv1", "stem/shift/bias": "bias1", "classifier_shift/bias": "bias2", "classifier": "fc"}
    for i in (1, 2, 3):
        names |= {f"shift{i}/bias": f"{{}}.bias{i}a", f"conv{i}/shift/bias": f"{{}}.bias{i}b"}
        names |= {f"conv{i}/conv": f"{{}}.conv{i}", f"conv{i}/conv/scale": "{}.scale"}
    names["shortcut/conv"] = "{}.downsample"
    return Rules(names=names, block=_torchvision_block)


def _torchvision_block(stage: int, block: int) -> str:
    return f"layer{stage}.{block - 1}"


def _seresnet(net: Any) -> Rules:
    convolutions = ("conv1", "conv2") if net.block is seresnet.BasicBlock else ("conv1", "conv2", "conv3")
    return Rules(
        chains={
            "pre": "stem bn relu",
            "{}.residual": " bn relu ".join(convolutions) + " bn scale relu",
            "{}.shortcut": "shortcut bn scale",
            "{}.excitation": "excitation/dense1 relu excitation/dense2 sigmoid",
        },
        names={"classifier": "linear", LAST_BN: "lastbn"},
        block=lambda stage, block: f"stage{stage}.{block - 1}",
    )


def _densenet(net: Any) -> Rules:
    """Places of norms stay where there are none."""
    last = len(net.blocks)

    def layer(block: int, layer: int) -> str:
        there = f"dense_block_layer_{block - 1}" if block < last else f"dense_block{block - 1}"
        return f"features.{there}.bottle_neck_layer_{layer - 1}"

    chains = {"{}.bottle_neck": "norm/bn relu conv1 conv1/bn relu conv2"}
    for i in range(1, last):
        chains[f"features.transition_layer_{i - 1}.down_sample"] = f"transition{i}/norm/bn transition{i}/conv"
    names = {"stem/conv": "conv1", "norm/bn": "features.bn", "classifier": "linear", LAST_BN: "lastbn"}
    return Rules(chains, names, blocks=r"block(\d+)_layer(\d+)", block=layer)


def _squeezenet(net: Any) -> Rules:
    chains = {
        "stem": "stem bn",
        "{}.squeeze": "squeeze bn",
        "{}.expand_1x1": "expand1 bn",
        "{}.expand_3x3": "expand3 bn",
    }
    names = {"classifier/conv": "conv10", LAST_BN: "lastbn"}
    return Rules(chains, names, blocks=r"fire(\d+)", block="fire{}".format)


def _shufflenet(net: Any) -> Rules:
    """The names of torchvision, too, for the ImageNet form."""
    stem, shortcut, branch = ("conv1", "branch1", "branch2") if net.imagenet else ("pre", "shortcut", "residual")
    return Rules(
        chains={
            stem: "stem bn relu",
            f"{{}}.{branch}": "conv1 bn relu conv2 bn conv3 bn scale relu",
            f"{{}}.{shortcut}": "shortcut1 bn shortcut2 bn scale relu",
            "conv5": "last_conv bn scale relu",
        },
        names={"after/scale": "{}.scale", "after/bias": "{}.bias", "classifier": "fc", LAST_BN: "lastbn"},
        blocks=r"stage(\d+)_unit(\d+)",
        block=lambda stage, unit: f"stage{stage + 1}.{unit - 1}",
        image_shape=(224, 224, 3) if net.imagenet else (32, 32, 3),
    )


def _mobilenet(net: Any) -> Rules:
    def block(stage: int, block: int) -> str:
        repeats = mobilenet.STAGES[stage - 1][2]
        return f"stage{stage}.{block - 1}" if repeats > 1 else f"stage{stage}"

    return Rules(
        chains={
            "pre": "stem bn relu",
            "{}.residual": "conv1 bn relu conv2 bn relu conv3 bn",
            "conv1": "last_conv bn relu",
        },
        names={"conv3/conv/scale": "{}.scale", "classifier/conv": "conv2", LAST_BN: "lastbn"},
        block=block,
    )


FAMILIES: dict[type, Callable[[Any], Rules]] = {
    VGG: _vgg,
    ResNet: _resnet,
    SqueezeNet: _squeezenet,
    SEResNet: _seresnet,
    DenseNet: _densenet,
    ShuffleNetV2: _shufflenet,
    MobileNetV2: _mobilenet,
}
"""The rules of every family, by our module's class; a function of the module, which says what it has."""


def rules_of(model: Any) -> Rules:
    """The rules of a network.

    Raises:
      StateDictError: where no PyTorch code with known names has this network under this method.
    """
    if type(model) not in FAMILIES:
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise StateDictError(f"the PyTorch names of a {type(model).__name__} are not known; those of {known} are")
    method: Method = model.factory.method
    norm_alone = isinstance(method.norm, BatchNorm) and not method.last_batch_norm
    if not (norm_alone or (method.norm is None and isinstance(method.residual, GainScalars | Fixup))):
        raise StateDictError(
            f"no PyTorch network with known names is under method={method.name!r}: choose batchnorm, mimicnorm, "
            "weightmean, lastbn, none or, for a ResNet, fixup"
        )
    if method.last_batch_norm and (scale := getattr(model.factory.last_batch_norm(train=False), "scale", 1.0)) != 1.0:
        raise StateDictError(
            f"the last BatchNorm of the PyTorch code has no scale, and this network's multiplies logits by {scale:g}: "
            "use the network with logit_scale 1, whose variables are the same and whose logits lack that factor"
        )
    return FAMILIES[type(model)](model)
