"""One call that converts, and the report of what it did, for linen and NNX."""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx

from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule
from mimicnorm_jax.interop.conversion.from_linen import Mimic
from mimicnorm_jax.interop.conversion.from_nnx import mimic_nnx, nnx_report
from mimicnorm_jax.interop.conversion.linen_report import linen_report
from mimicnorm_jax.interop.conversion.records import Choice, Report, Select
from mimicnorm_jax.linen.last_norm import WithLastBatchNorm, kind_of
from mimicnorm_jax.linen.norm import LastBatchNorm
from mimicnorm_jax.nnx.norm import LastBatchNorm as NNXLastBatchNorm


def mimic(
    module: Any,
    *,
    rule: Rule = PUBLISHED_CIFAR_RULE,
    select: Select | None = None,
    keep_bias: bool = False,
    norm: Callable[..., Any] | None = LastBatchNorm,
    num_classes: int | None = None,
) -> Any:
    """A network of other code, linen or NNX, under MimicNorm (section 3): as it is, but for three things.

    Kernels of `nn.Conv` and `nn.Dense` (`nnx.Conv`, `nnx.Linear`) are centered where they are chosen; `nn.BatchNorm`s
    do nothing; one BatchNorm without scale and bias stands on the logits. Nothing else is changed, and `layer_report`
    says what was done to each layer. Parameters keep their names: the tree is that of the network less its BatchNorms,
    and the running averages of the last BatchNorm are `last_bn`. Initial kernels get their scale from `rescale_init`.

    In linen a module is returned that is called as the given one is, and can stand in another; it trains where its
    BatchNorms would, see `linen.WithLastBatchNorm`. In NNX a converted copy is returned, whose `train()` and `eval()`
    say so; a call that tells BatchNorms otherwise is refused.

    Args:
      module: a linen module, or an NNX one; unbound, or made inside of a parent.
      rule: which convolutions are centered, asked with the kernel's shape and the groups.
      select: in place of the rule, asked with each convolution and dense layer, a `Layer`: path, kind, shape, groups.
      keep_bias: whether a BatchNorm becomes the addition of its bias, under its name, instead of nothing: MimicNorm's
        networks have one behind each convolution. Its scale always goes.
      norm: makes the last norm, with the options of `LastBatchNorm`; None for none, which is weight mean only, and for
        outputs that are not `(B, C)`.
      num_classes: C, which NNX needs; in linen the logits say it.

    Returns:
      A `Mimic`, or a copy of the NNX module.

    Raises:
      ValueError: when it is made (NNX), initialized or called (linen): if no kernel is centered, the output is not
        `(B, C)`, a subclass of BatchNorm has a call of its own, or it is not said whether a call is training.
      TypeError: if `module` is no Flax module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mimicnorm_jax.interop import rescale_init
      >>> plain = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=False), lambda x: x.mean((1, 2))])
      >>> model = mimic(plain)
      >>> images = jnp.ones((4, 5, 5, 16))
      >>> params = rescale_init(model.init(jax.random.key(0), images)["params"], layer_report(model, images))
      >>> print(layer_report(model, images))
      layer     kind           kernel    done       gain   why
      layers_0  Conv           3x3x16x8  centered   1.215
      layers_1  BatchNorm                identity          behind layers_0
      last_bn   LastBatchNorm            last norm
    """
    choice = Choice(rule, select)
    if isinstance(module, WithLastBatchNorm):
        raise ValueError(f"{type(module.wrapped).__name__} has a last BatchNorm already: convert the module in it")
    if isinstance(module, nn.Module):
        return Mimic(module, norm, choice, keep_bias)
    if isinstance(module, nnx.Module):
        kind, given = kind_of(norm)
        if kind is LastBatchNorm:
            norm = functools.partial(NNXLastBatchNorm, *getattr(norm, "args", ()), **given)
        return mimic_nnx(module, choice, keep_bias=keep_bias, num_classes=num_classes, norm=norm)
    raise TypeError(f"mimic converts Flax modules, of linen or NNX; got {type(module).__name__}")


def layer_report(model: nn.Module | nnx.Module, *inputs: Any, **options: Any) -> Report:
    """Which kernels of a network are centered, and what else a conversion did: one record a layer.

    Of networks of this package and of any other, converted or not.

    Args:
      model: of linen or NNX.
      inputs, options: of a linen module's call, arrays or `jax.ShapeDtypeStruct`s; nothing is computed. None in NNX.

    Returns:
      The records; as text a table.
    """
    return nnx_report(model) if isinstance(model, nnx.Module) else linen_report(model, *inputs, **options)
