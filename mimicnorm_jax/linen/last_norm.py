"""A last BatchNorm on the output of a module that has none."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from mimicnorm_jax.linen.interception import intercept
from mimicnorm_jax.linen.norm import LastBatchNorm
from mimicnorm_jax.linen.wrapper import Transformed

LAST_BN = "last_bn"
"""Name of the last BatchNorm in every network, and so of its running averages."""
_USES_AVERAGE = {"train": False, "training": False, "is_training": False, "deterministic": True}
"""By the argument of a module's call: at which value it asks for running averages."""


class _Norms(NamedTuple):
    """What the BatchNorms of one call were told."""

    uses_average: set[bool]
    axis_names: set[str | None]


class WithLastBatchNorm(nn.Module):
    """A module, and one BatchNorm without scale and bias on its logits (section 3.2, "last BN layer").

    Parameters and variables of the module keep their names, in whatever it stands in; the running averages are
    `batch_stats/last_bn`. It is called as the module is, and trains where the module does: as its BatchNorms are told
    and as the argument `train`, `training`, `is_training` or `deterministic` of its call says.

    Attributes:
      wrapped: any Flax module whose output are logits `(B, C)`.
      norm: makes the norm, with the options of `LastBatchNorm`. It is synchronized over the axis of the module's
        BatchNorms, if they are, unless `functools.partial(LastBatchNorm, axis_name=...)` says otherwise. None for no
        norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from functools import partial
      >>> model = WithLastBatchNorm(nn.Dense(3), norm=partial(LastBatchNorm, use_running_average=False))
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> jax.tree.map(jnp.shape, variables["params"]), list(variables["batch_stats"])
      ({'bias': (3,), 'kernel': (4, 3)}, ['last_bn'])
    """

    wrapped: nn.Module
    norm: Callable[..., nn.Module] | None = LastBatchNorm

    def setup(self) -> None:
        nn.share_scope(self, self.wrapped)

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The module's logits, normalized.

        Args:
          args, kwargs: of the module.

        Returns:
          `(B, C)`, in at least float32.

        Raises:
          ValueError: if the output is no array `(B, C)`, or the module has a `last_bn` already; if BatchNorms and
            arguments disagree on whether this is training, or none says; and as `LastBatchNorm`.
        """
        if self.norm is None:
            return self._call_module(*args, **kwargs)
        told = _Norms(set(), set())

        def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
                _note(told, context, args, kwargs)
            elif self.path_of(context.module) == (*self.path, LAST_BN):
                raise ValueError(f"{type(self.wrapped).__name__} has a layer {LAST_BN!r} already, a last BatchNorm")
            return call(*args, **kwargs)

        with intercept(note, object()):  # of its own: a trace that `nn.jit` kept of another call would tell nothing
            logits = self._call_module(*args, **kwargs)
        if not hasattr(logits, "ndim") or logits.ndim != 2:
            raise ValueError(
                f"a last BatchNorm stands on logits (B, C); {type(self.wrapped).__name__} gives "
                f"{getattr(logits, 'shape', type(logits).__name__)}: wrap the part of it whose output are logits"
            )
        axis = {} if told.axis_names <= {None} or not self._takes_axis() else {"axis_name": self._axis(told)}
        norm = self.norm(name=LAST_BN, **axis)
        given = getattr(norm, "use_running_average", None)
        return norm(logits) if given is not None else norm(logits, use_running_average=self._mode(told, args, kwargs))

    @nn.nowrap
    def path_of(self, layer: nn.Module) -> tuple[str, ...]:
        """The path of a layer inside, in the tree that holds this module."""
        own, path = self.path, layer.path
        if path[: len(own)] != own:
            return path  # made by a module outside and handed in
        # Modules in fields of the wrapped one were bound before the scope was shared, under the field's name here.
        stale = path[: len(own) + 1] == (*own, "wrapped")
        return (*own, *path[len(own) + stale :])

    @nn.nowrap
    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    @nn.nowrap
    def _takes_axis(self) -> bool:
        kind, options = kind_of(self.norm)
        return kind is LastBatchNorm and "axis_name" not in options

    @nn.nowrap
    def _axis(self, told: _Norms) -> str | None:
        if len(told.axis_names) > 1:
            raise ValueError(
                f"the BatchNorms of {type(self.wrapped).__name__} are synchronized over different axes, "
                f"{told.axis_names}: give norm=functools.partial(LastBatchNorm, axis_name=...)"
            )
        return next(iter(told.axis_names))

    @nn.nowrap
    def _mode(self, told: _Norms, args: Any, kwargs: Any) -> bool:
        said = told.uses_average | _said(self.wrapped, args, kwargs)
        if len(said) == 1:
            return said.pop()
        if not said and self.is_initializing():  # which moves no averages
            return False
        name = type(self.wrapped).__name__
        way_out = "or give norm=functools.partial(LastBatchNorm, use_running_average=...)"
        if said:
            raise ValueError(
                f"BatchNorms and arguments of {name} disagree on whether this call is training: make them agree, "
                f"{way_out}"
            )
        raise ValueError(
            f"nothing says whether this call of {name} is training: no BatchNorm was called, and its call has none of "
            f"the arguments {', '.join(_USES_AVERAGE)}: add one, {way_out}"
        )


def kind_of(norm: Callable[..., Any] | None) -> tuple[Any, dict[str, Any]]:
    """What makes a norm, and the options that a `functools.partial` gives it."""
    return (norm.func, norm.keywords) if isinstance(norm, partial) else (norm, {})


def call_signature(module: nn.Module) -> inspect.Signature:
    """The signature of a module's call; of `WithLastBatchNorm` and `Transformed`, that of the module in it."""
    while isinstance(module, WithLastBatchNorm | Transformed):
        module = module.wrapped if isinstance(module, WithLastBatchNorm) else module.module
    return inspect.signature(module.__call__)


def _note(told: _Norms, context: Any, args: Any, kwargs: Any) -> None:
    """Where a subclass has other arguments around Flax's call, that one, which is noted too, says the mode."""
    norm = context.module
    given = inspect.signature(context.orig_method).bind(*args, **kwargs).arguments
    uses_average = given.get("use_running_average")
    uses_average = norm.use_running_average if uses_average is None else uses_average
    if uses_average is not None:
        told.uses_average.add(bool(uses_average))
    told.axis_names.add(norm.axis_name)


def _said(module: nn.Module, args: Any, kwargs: Any) -> set[bool]:
    """Whether running averages are asked for, by each argument of the call that tells."""
    signature = call_signature(module)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name)
    return {bool(given[name]) is at for name, at in _USES_AVERAGE.items() if given.get(name) is not None}
