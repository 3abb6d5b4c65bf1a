"""Whatever a config holds, it is accepted or refused by a message that names a field."""

import math

import jax
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mimicnorm_jax.data import DATASETS
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.init_schemes import SCHEMES
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.models import ARCHITECTURES
from mimicnorm_jax.training import config
from mimicnorm_jax.training.spec import validate_run

NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([10**30, -(10**30), 2**31, 2**63, 0, 1, 64]), st.floats(), st.floats(0, 2)
)
ANYTHING = st.one_of(
    NUMBERS, st.booleans(), st.text(max_size=8), st.none(), st.tuples(NUMBERS), st.lists(NUMBERS, max_size=3)
)
SENSIBLE = {
    "model": st.sampled_from(sorted(ARCHITECTURES)),
    "method": st.sampled_from(sorted(METHODS)),
    "init_scheme": st.sampled_from(sorted(SCHEMES)),
    "dataset": st.sampled_from(sorted(DATASETS)),
    "data_dir": st.sampled_from(["", "/nowhere", "a\0b", "~"]),
    "batch_size": st.sampled_from([1, 3, 4, 8, 64, 66]),
    "microbatches": st.sampled_from([1, 2, 3, 16]),
}


def _value(name):
    default = config.FIELDS[name].default
    kinds = {bool: st.booleans(), int: st.integers(-1, 100), float: st.floats(-1, 2), str: st.text(max_size=8)}
    near = kinds.get(type(default), st.tuples(st.integers(0, 90), st.integers(0, 90)))
    return st.one_of(SENSIBLE.get(name, near), near, ANYTHING)


@st.composite
def overrides(draw):
    names = draw(st.lists(st.sampled_from(sorted(config.FIELDS)), max_size=4, unique=True))
    return {name: draw(_value(name)) for name in names}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(overrides())
@example({"data_dir": "a\0b", "dataset": "cifar100"})
@example({"learning_rate": math.nan})
@example({"batch_size": 10**30})
@example({"seed": 10**30})
@example({"width_multiplier": 1e300})
@example({"width_multiplier": 1e-300})
def test_any_config_is_accepted_or_refused_by_the_name_of_a_field(fields):
    values = {name: field.default for name, field in config.FIELDS.items()} | fields
    try:
        accepted = config.validate(ConfigDict(values, convert_dict=False))
        validate_run(accepted)
        jax.random.key(accepted.seed)
    except UserError as error:
        message = str(error)
        # The field itself, or the dataset that a folder was to hold.
        assert any(name in message for name in (*fields, "data_dir", "batch_size")), message
