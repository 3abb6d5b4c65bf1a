"""What a user's own network may keep: whole numbers beside averages, and parameters of any type."""

from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn

from mimicnorm_jax import training
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.training.resilience import Checkpoints

# Orbax leaves coroutines behind where it reads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Counting(nn.Module):
    """Keeps whole numbers beside averages; its parameters are of any type."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        seen = self.variable("batch_stats", "seen", lambda: jnp.zeros((), jnp.int32))
        begun = self.variable("batch_stats", "begun", lambda: jnp.zeros((), bool))
        if train and not self.is_initializing():
            seen.value, begun.value = seen.value + 1, jnp.ones((), bool)
        return nn.Dense(10, param_dtype=self.param_dtype)(images.reshape(len(images), -1))


def _config(**fields):
    return training.validate(training.base(**{"epochs": 1, "batch_size": 256, "warmup_epochs": 1.0} | fields))


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_counter_stays_a_whole_number(tmp_path, steps_per_call):
    """float32, as which an average over devices would come, ends counting at 2^24."""
    config = _config(steps_per_call=steps_per_call)
    training.run(config, tmp_path, Counting())
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        state, _ = checkpoints.restore(5, training.build_spec(config, model=Counting()).state_template())
    assert (state.batch_stats["seen"].dtype, state.batch_stats["begun"].dtype) == (jnp.int32, bool)
    assert (int(state.batch_stats["seen"]), bool(state.batch_stats["begun"])) == (5, True)


def test_an_average_that_would_stand_still_is_refused():
    """bfloat16 knows no thousandth part of a number's difference to another."""
    model = Counting(param_dtype=jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"ema_decay is 0.999, but Dense_0/bias is bfloat16, in which an average"):
        training.build_spec(_config(ema_decay=0.999), model=model)
    training.build_spec(_config(), model=model)
