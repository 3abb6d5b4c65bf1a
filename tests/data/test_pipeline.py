"""Another pipeline behind the same interface: what trains does not know where batches come from."""

import dataclasses

import jax
import numpy as np

from mimicnorm_jax.data import Batch
from mimicnorm_jax.training import base, build_spec, build_trainer, validate
from mimicnorm_jax.training.loop import evaluate, train_epoch
from mimicnorm_jax.training.metrics import Metrics


def _as_it_is(resident, feed):
    assert resident == ()
    return feed


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Hands over the images themselves, in the order of the resident pipeline; nothing stays on the devices."""

    resident: object
    dataset: object
    train: tuple = ()
    test: tuple = ()
    make_batch = staticmethod(_as_it_is)

    @property
    def steps_per_epoch(self):
        return self.resident.steps_per_epoch

    def train_feeds(self, epoch, first):
        for (index, _), num_steps in self.resident.train_feeds(epoch, first):
            yield Batch(self.dataset.train.images[index], self.dataset.train.labels[index]), num_steps

    def test_feeds(self):
        for index, mask in self.resident.test_feeds():
            yield Batch(self.dataset.test.images[index], self.dataset.test.labels[index], mask)


def test_a_streaming_pipeline_gives_the_run_of_the_resident_one():
    """Two calls of two steps and one of one, with augmentation, on all devices."""
    fields = {"batch_size": 256, "width_multiplier": 0.25, "crop_padding": 1, "steps_per_call": 2}
    trainer = build_trainer(build_spec(validate(base(**fields))))
    stream = Streaming(trainer.pipeline, trainer.dataset)
    streaming = dataclasses.replace(
        trainer,
        pipeline=stream,
        train_steps=trainer.data_parallel.make_train_steps(trainer.step_config, stream.make_batch),
        eval_step=trainer.data_parallel.make_eval_step(trainer.step_config, stream.make_batch),
    )
    found = []
    for each in (trainer, streaming):
        state = each.data_parallel.replicate(each.spec.init_state())
        state, train = train_epoch(each, state, 0, Metrics.empty())
        found.append(jax.device_get((state, train, evaluate(each, state))))
    assert found[0][0].step == 5
    assert found[0][2].count == 360
    # Two programs, which XLA may fuse differently: float32 after five steps of parameters of order 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
