"""Every field refuses what it cannot be, by name."""

import dataclasses

import pytest

from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.training import build_spec, config

BAD = {
    "seed": -1,
    "dtype": "float16",
    "width_multiplier": 0.0,
    "logit_scale": 0.0,
    "batch_size": 1,
    "microbatches": 0,
    "steps_per_call": 0,
    "epochs": 0,
    "learning_rate": float("nan"),
    "warmup_epochs": -0.5,
    "schedule": "lines",
    "decay_epochs": (3, 2),
    "decay_factor": 1.5,
    "momentum": 1.0,
    "weight_decay": float("inf"),
    "scalar_rate": -1.0,
    "label_smoothing": -0.1,
    "ema_decay": 1.0,
    "rotation": 181.0,
    "centering": "sometimes",
    "running_variance": "exact",
    "keep_checkpoints": 0,
}


def test_defaults_are_valid():
    config.validate(config.base())


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name):
    with pytest.raises(ConfigError, match=f"config.{name} is .*: it must be "):
        config.validate(config.base(**{name: BAD[name]}))


@pytest.mark.parametrize("name", config.FIELDS)
def test_values_of_a_wrong_type_are_named(name):
    for value in ([], None):
        with pytest.raises(ConfigError, match=f"config.{name} is "):
            config.validate(config.base(**{name: value}))


def test_true_is_not_a_number_and_one_is_a_float():
    with pytest.raises(ConfigError, match=r"config\.epochs is True"):
        config.validate(config.base(epochs=True))
    config.validate(config.base(learning_rate=1))


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ConfigError, match="unknown config field 'batchsize': did you mean batch_size"):
        config.base(batchsize=3)
    fields = config.base()
    fields.learnin_rate = 0.1
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        config.validate(fields)
    fields = config.base()
    del fields["epochs"]
    with pytest.raises(ConfigError, match="lacks the field 'epochs'"):
        config.validate(fields)


def test_model_and_method_after_the_colon():
    fields = config.with_model(config.base(), "vgg11,lastbn")
    assert (fields.model, fields.method) == ("vgg11", "lastbn")
    assert config.with_model(config.base(), ",none").model == config.base().model
    assert [config.with_model(config.base(), m).adaptive_clip for m in ("reactnet8,bnn_nobn", "resnet8,nf")] == [
        0.02,
        0.0,
    ]
    with pytest.raises(ConfigError, match=":a,b,c"):
        config.with_model(config.base(), "a,b,c")


def test_a_method_of_ones_own_keeps_its_scale_unless_the_config_says_another(monkeypatch):
    monkeypatch.setitem(METHODS, "surer", dataclasses.replace(METHODS["mimicnorm"], name="surer", logit_scale=2.0))
    for fields, scale in (({}, 2.0), ({"logit_scale": 3.0}, 3.0)):
        spec = build_spec(config.validate(config.base(method="surer", **fields)))
        assert spec.model.factory.method.logit_scale == scale
