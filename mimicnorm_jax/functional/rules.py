"""Which kernels a transform takes, by shape and groups; the published code's rules."""

from collections.abc import Callable

from mimicnorm_jax.functional.kernels import Shape, fan_in

Rule = Callable[[Shape, int], bool]
"""Whether a transform takes the kernel of this shape in a layer with this many groups."""


def fan_in_above(threshold: int) -> Rule:
    """Take kernels whose fan-in exceeds `threshold`; the published CIFAR code's rule with 50."""

    def rule(shape: Shape, groups: int) -> bool:
        del groups
        return fan_in(shape) > threshold

    return rule


def ungrouped(shape: Shape, groups: int) -> bool:
    """Take every kernel of a layer without groups; the published ImageNet code's rule.

    Args:
      shape: of a kernel, see `Rule`.
      groups: of its layer's channels.
    """
    del shape
    return groups == 1


def always(shape: Shape, groups: int) -> bool:
    """Take every kernel.

    Args:
      shape: of a kernel, see `Rule`.
      groups: of its layer's channels.
    """
    del shape, groups
    return True


def never(shape: Shape, groups: int) -> bool:
    """Take no kernel.

    Args:
      shape: of a kernel, see `Rule`.
      groups: of its layer's channels.
    """
    del shape, groups
    return False


PUBLISHED_CIFAR_RULE: Rule = fan_in_above(50)
"""Neither a 3-channel 3x3 stem, nor depthwise kernels, nor pointwise kernels of few channels."""
