"""A last BatchNorm around a module: it trains, and is synchronized, as the module is told to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.functional import KernelTransform, never
from mimicnorm_jax.linen import LastBatchNorm, Transformed, WithLastBatchNorm


class Body(nn.Module):
    """A BatchNorm, synchronized or not."""

    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=not self.train, axis_name=self.axis_name)(x)


JitBody = nn.jit(Body)  # one class, so that it keeps its traces from call to call


class Logits(nn.Module):
    """A network of which only a part under `nn.jit` says over which axis it is synchronized."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(3)(JitBody(self.axis_name, train, name="body")(x))


class Moded(nn.Module):
    """A network that says whether it trains by an argument with a default."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(x)


def test_a_part_under_nn_jit_tells_at_every_call_what_it_told_at_the_first():
    """The slow path is the whole batch on one device."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 4)) + jnp.arange(2.0)[:, None, None]
    net = WithLastBatchNorm(Logits("d"))
    variables = net.init(jax.random.key(1), x[0])
    whole, stats = WithLastBatchNorm(Logits(None)).apply(variables, x.reshape(16, 4), mutable="batch_stats")

    share = jax.vmap(lambda x: net.apply(variables, x, mutable="batch_stats"), axis_name="d")
    for _ in range(2):
        found, moved = share(x)
        # float32: the same sums in another order, of numbers of order 1.
        np.testing.assert_allclose(found.reshape(16, 3), whole, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-6), moved, stats)


def test_a_transformed_module_says_by_its_own_arguments_whether_it_trains():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    plain = WithLastBatchNorm(Moded())
    wrapped = WithLastBatchNorm(Transformed(Moded(), KernelTransform(jnp.negative, never)))
    variables = plain.init(jax.random.key(1), x)
    for arguments in ((), (True,), (False,)):
        found, expected = (net.apply(variables, x, *arguments, mutable="batch_stats") for net in (wrapped, plain))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


class OtherArguments(nn.BatchNorm):
    """Says by an argument of its own whether it trains, as code of others does around Flax's norm."""

    @nn.compact
    def __call__(self, x, train=True):
        return super().__call__(x, use_running_average=not train)


class Others(nn.Module):
    """A network of such norms, told by position or by name."""

    by_name: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        norm = OtherArguments(axis_name=self.axis_name)
        return nn.Dense(3)(norm(x, train=train) if self.by_name else norm(x, train))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_norm_around_flaxs_with_other_arguments_says_what_flaxs_is_told(by_name):
    x = jax.random.normal(jax.random.key(0), (8, 4))
    net = WithLastBatchNorm(Others(by_name))
    variables = net.init(jax.random.key(1), x)
    for train in (True, False):
        logits, moved = net.apply(variables, x, train, mutable="batch_stats")
        body = {name: part for name, part in variables["batch_stats"].items() if name != "last_bn"}
        given, _ = Others(by_name).apply({"params": variables["params"], "batch_stats": body}, x, train, mutable=True)
        last, own = LastBatchNorm(use_running_average=not train), {"batch_stats": variables["batch_stats"]["last_bn"]}
        expected, stats = last.apply(own, given, mutable="batch_stats")
        np.testing.assert_allclose(logits, expected, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, moved["batch_stats"]["last_bn"], stats["batch_stats"])


def test_options_of_the_last_norm_leave_it_synchronized_as_the_modules_are():
    x = jax.random.normal(jax.random.key(0), (2, 8, 4)) + jnp.arange(2.0)[:, None, None]
    nets = [WithLastBatchNorm(Logits(axis), norm=partial(LastBatchNorm, scale=2.0)) for axis in ("d", None)]
    variables = nets[1].init(jax.random.key(1), x[0])
    found, _ = jax.vmap(lambda x: nets[0].apply(variables, x, mutable="batch_stats"), axis_name="d")(x)
    expected, _ = nets[1].apply(variables, x.reshape(16, 4), mutable="batch_stats")
    np.testing.assert_allclose(found.reshape(16, 3), expected, atol=1e-5)  # float32 sums in another order
