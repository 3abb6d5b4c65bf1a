"""The timing of what stands around a step: nothing is timed that did not train."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import input_pipeline


@pytest.mark.parametrize("done", [0, 3])
def test_an_arm_that_leaves_out_steps_after_the_first_round_is_refused(done, monkeypatch):
    """As an epoch does that is begun with a state behind it."""
    state = SimpleNamespace(step=np.int32(0))
    trainer = SimpleNamespace(
        steps_per_epoch=4,
        data_parallel=SimpleNamespace(replicate=lambda state: state),
        spec=SimpleNamespace(init_state=lambda: state),
    )
    steps = iter([4, 4, done])
    arms = {"loop": lambda state: SimpleNamespace(step=state.step + next(steps))}
    monkeypatch.setattr(input_pipeline, "arms", lambda trainer, train: arms)
    monkeypatch.setattr(input_pipeline.jax, "block_until_ready", lambda state: state)
    monkeypatch.setattr(input_pipeline.jax, "device_get", lambda state: state)
    with pytest.raises(RuntimeError, match="loop has not done the steps"):
        input_pipeline.measure(trainer, None, rounds=2)
