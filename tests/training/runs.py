"""Small runs on digits."""

import contextlib

import jax
import pytest

from mimicnorm_jax.training import config, spec
from mimicnorm_jax.training.model import init_variables
from mimicnorm_jax.training.resilience import Checkpoints
from mimicnorm_jax.training.state import first_state


def small_config(**fields):
    defaults = {
        "model": "short",
        "width_multiplier": 0.25,
        "epochs": 2,
        "warmup_epochs": 1.0,
        "crop_padding": 1,
        "rotation": 10.0,
        "ema_decay": 0.9,
    }
    return config.validate(config.base(**defaults | fields))


def create_state(model, tx, image_shape, seed, ema):
    """A state before its first step, without a config."""
    variables = init_variables(model, jax.random.key(seed), image_shape)
    return first_state(variables["params"], variables.get("batch_stats", {}), tx, ema)


def restored(folder, fields):
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        assert checkpoints.latest is not None
        return checkpoints.restore(checkpoints.latest, spec.build_spec(fields).state_template())


@contextlib.contextmanager
def stopped_after_a_save(monkeypatch):
    """A run in here ends where it has asked for its first checkpoint."""

    def stop(self, state, metadata, save=Checkpoints.save):
        save(self, state, metadata)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
