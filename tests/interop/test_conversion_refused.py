"""What can be converted, and what is refused with its reason."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.data import DATASETS
from mimicnorm_jax.functional import never
from mimicnorm_jax.interop import mimic
from mimicnorm_jax.linen import LastBatchNorm, WithLastBatchNorm
from mimicnorm_jax.training.model import require_trainable, train_option
from tests.diagnostics.networks import filled
from tests.interop.foreign import IMAGES, Net, UNet, applied, pooled


class Silent(nn.Module):
    """Says nowhere whether it is trained."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3))(nn.Conv(8, (3, 3))(x)).mean((1, 2))


class Renorm(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return x / 2


class WithRenorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return Renorm(not train, name="renorm")(nn.Conv(8, (5, 5))(x)).mean((1, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: mimic(nn.Sequential([nn.GroupNorm(3), pooled])),
            "no convolution and no dense layer",
        ),
        (lambda: mimic(Net(), rule=never), r"no kernel of Net is centered.*by the rule: fan-in 27"),
        (lambda: mimic(nn.Dense(3)), "a dense layer, which the rule does not take"),
        (lambda: mimic(UNet((8, 16))), r"stands on logits \(B, C\); UNet gives \(4, 8, 8, 2\)"),
        (lambda: mimic(WithRenorm()), "renorm is a Renorm, a BatchNorm with a __call__ of its own"),
        (lambda: WithLastBatchNorm(models.create("resnet8", num_classes=5)), "ResNet has a layer 'last_bn' already"),
        (lambda: mimic(mimic(Net())), "Net has a last BatchNorm already"),
        (lambda: mimic(nn.Sequential([mimic(Net())])), "converted twice"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model().init, jax.random.key(0), IMAGES)


def test_an_object_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="linen or NNX; got function"):
        mimic(lambda x: x)


def test_without_a_last_norm_any_output_will_do():
    model = mimic(UNet((8, 16)), norm=None)
    y, variables = jax.eval_shape(functools.partial(model.init_with_output, train=True), jax.random.key(0), IMAGES)
    assert set(variables) == {"params"}
    assert y.shape == (4, 8, 8, 2)


def test_training_takes_a_converted_network_as_it_takes_the_plain_one():
    spec = dataclasses.replace(DATASETS["digits"], num_classes=5)
    for module in (Net(), mimic(Net())):
        assert train_option(module, True) == {"train": True}
        require_trainable(module, spec, jnp.float32)


class Half(nn.Module):
    """One norm is frozen."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(True)(nn.BatchNorm(not train)(nn.Conv(8, (5, 5))(x))).mean((1, 2))


def test_a_call_that_does_not_say_whether_it_is_training_is_refused():
    for module, options, message in ((Silent(), {}, "nothing says"), (Half(), {"train": True}, "disagree")):
        model = mimic(module)
        variables = filled(model, IMAGES)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(model.apply, **options, mutable=["batch_stats"]), variables, IMAGES)
        said = mimic(module, norm=functools.partial(LastBatchNorm, use_running_average=False))
        logits, _ = applied(said, variables, IMAGES, **options, mutable=["batch_stats"])
        # The variance is over four images and epsilon 1e-5.
        np.testing.assert_allclose(logits.mean(0), 0, atol=1e-4)
