"""Runs whose images are decoded as they are needed."""

import dataclasses
import os
import signal
import threading
from functools import partial
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data import DATASETS, DatasetSpec, Split
from mimicnorm_jax.data.batching import epoch_order
from mimicnorm_jax.data.folder import FolderSource, sources
from mimicnorm_jax.data.streaming import Encoded, decoding_threads, pipeline
from mimicnorm_jax.errors import ConfigError, DataError, WorkdirError
from mimicnorm_jax.training import (
    Metrics,
    base,
    build_spec,
    build_trainer,
    loop,
    plan_training,
    read_metrics,
    train_epoch,
    validate,
)
from mimicnorm_jax.training.resilience import Checkpoints, InterruptedRunError
from tests.conftest import also
from tests.data.photographs import write_folder
from tests.training.runs import stopped_after_a_save

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("one_block"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class _Files:
    """A split as PNG files."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        buffer = BytesIO()
        Image.fromarray(self.split.images[index]).save(buffer, "PNG")
        return Encoded(buffer.getvalue(), int(self.split.labels[index]), f"{index}")


def _two_epochs(fields):
    trainer = build_trainer(build_spec(fields))
    state = trainer.data_parallel.replicate(trainer.spec.init_state())
    found = []
    for epoch in range(2):
        state, metrics = train_epoch(trainer, state, epoch, Metrics.empty())
        found += [metrics, loop.evaluate(trainer, state)]
    return jax.device_get((state, found))


def noise_runs(monkeypatch, **fields):
    """Two epochs of five steps on noise, resident and streamed, with augmentation on all devices."""
    rng = np.random.default_rng(0)
    splits = [Split(rng.integers(0, 256, (n, 8, 8, 3), np.uint8), rng.integers(0, 4, n, np.int32)) for n in (84, 21)]
    spec = DatasetSpec("noise", (8, 8, 3), 4, 84, 21, lambda *_: splits, open=lambda *_: tuple(map(_Files, splits)))
    monkeypatch.setitem(DATASETS, "noise", spec)
    fields |= {"dataset": "noise", "batch_size": 16, "width_multiplier": 0.25, "crop_padding": 1, "flip": True}
    return [_two_epochs(validate(base(**fields, streaming=streaming))) for streaming in (False, True)]


@pytest.mark.parametrize(("parallelism", "steps"), [("pmap", 2), also("shard_map", 1)])
def test_a_stream_of_the_same_images_gives_the_same_run(monkeypatch, parallelism, steps):
    """Up to float32's rounding after ten steps: the tests' quick compiler fuses the two programs differently."""
    runs = noise_runs(monkeypatch, parallelism=parallelism, steps_per_call=steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *runs)


def _folder_config(root, **fields):
    """11 steps an epoch, from 44 images of two classes cut to 16 x 16."""
    defaults = {"dataset": f"folder:{root}", "image_size": 16, "min_crop_area": 0.2, "flip": True, "batch_size": 4}
    return validate(base(**defaults | {"width_multiplier": 0.25, "epochs": 2} | fields))


def _final(folder, fields):
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        found = checkpoints.restore_newest(build_spec(fields).state_template())
    assert found is not None
    return found


def _run_with(monkeypatch, fields, folder, call, act):
    """A run that does something before the `call`-th of its calls of steps."""
    build = loop.build_trainer

    def acting(spec):
        trainer, calls = build(spec), []

        def train_steps(*args):
            calls.append(args)
            if len(calls) == call:
                act()
            return trainer.train_steps(*args)

        return dataclasses.replace(trainer, train_steps=train_steps)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_trainer", acting)
        loop.run(fields, folder)


def _run_stalled(monkeypatch, fields, folder, place, call):
    """A run that is interrupted while it waits for an image that a disk does not give, after `call` calls of steps.

    Returns:
      What the run ended with; the disk stalls until then.
    """
    stalled, go_on, acted = threading.Event(), threading.Event(), []
    get, wait = FolderSource.__getitem__, pipeline.wait

    def stall(source, index):
        if acted and source.folder / source.files[index] == place:
            stalled.set()
            go_on.wait(60)
        return get(source, index)

    def interrupted(*args):
        found = wait(*args)
        if found.not_done and stalled.is_set() and len(acted) == 1:  # one thread: all images before are there
            acted.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "__getitem__", stall)
        patch.setattr(pipeline, "wait", interrupted)
        patch.setattr(pipeline, "STOP_SECONDS", 0.3)
        patch.setattr(decoding_threads, "LEAVE_SECONDS", 0.1)
        with pytest.raises(InterruptedRunError, match="stopped by SIGINT") as stopped:
            _run_with(monkeypatch, fields, folder, call, lambda: acted.append(call))
        held = [thread for thread in threading.enumerate() if thread.name.startswith("decode_")]
        assert held, "the disk has given its image"
        go_on.set()
        for thread in held:
            thread.join()
    return stopped.value


def _stopped(monkeypatch, fields, folder, case):
    """A run that does not come to its end; the step it has to save."""
    train, test, _ = sources(Path(fields.dataset.removeprefix("folder:")))
    # The image of the last step but one of the second epoch; the one after it is decoded with it.
    lost = train.folder / train.files[epoch_order(fields.seed, 1, 44)[37]]
    shown = test.folder / test.files[-1]
    if case == "stopped":
        with pytest.raises(InterruptedRunError, match="after step 15"):
            _run_with(monkeypatch, fields, folder, 15, lambda: signal.raise_signal(signal.SIGTERM))
        return 15
    if case.startswith("vanished"):
        path, call, step = (shown, 11, 11) if "test" in case else (lost, 13, 11 + 9)
        away = folder.parent / "elsewhere"
        with pytest.raises(DataError, match=f"cannot be used: FileNotFoundError.*{path}.* config.max_bad_images is 2"):
            _run_with(monkeypatch, fields, folder, call, partial(path.rename, away))
        away.rename(path)
        return step
    path, call, step = (shown, 20, 22) if "test" in case else (lost, 13, 11 + 9)
    assert _run_stalled(monkeypatch, fields, folder, path, call).step == step
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [("stopped", "vanished test image", "stalled"), ("vanished", "stalled test image")],
    ids=lambda cases: cases[0],
)
def test_interrupted_runs_go_on_to_the_same_bits_and_name_what_they_skipped(tmp_path, monkeypatch, cases):
    """Stopped in the middle of an epoch, or ended there or in evaluation by a file that vanishes or, when asked to
    stop, a disk that stalls; going on with other threads. One training and one test image are no images.
    """
    root = write_folder(tmp_path / "data", 2, 22, 5)
    (root / "train" / "class01" / "003.jpg").write_bytes(b"")
    (root / "val" / "class00" / "000.jpg").write_text("weasel")
    fields, other = (_folder_config(root, max_bad_images=2, decoding_threads=threads) for threads in (1, 3))
    summary = loop.run(fields, tmp_path / "whole")
    assert [name.split("data/")[1] for name in summary["skipped_images"]] == [
        "train/class01/003.jpg",
        "val/class00/000.jpg",
    ]
    whole, record = _final(tmp_path / "whole", fields)
    losses = [row["test_loss"] for row in read_metrics(tmp_path / "whole")]
    for case in cases:
        step = _stopped(monkeypatch, fields, tmp_path / case, case)
        with Checkpoints(tmp_path / case / "checkpoints", 2) as checkpoints:
            assert checkpoints.latest == step, case
        loop.run(other, tmp_path / case)
        parts, about = _final(tmp_path / case, fields)
        jax.tree.map(np.testing.assert_array_equal, whole, parts)
        assert record == about, case
        assert losses == [row["test_loss"] for row in read_metrics(tmp_path / case)], case


def test_a_run_does_not_go_on_in_the_order_of_other_images(tmp_path, monkeypatch):
    """It would train parts of an epoch twice or never. An image that is lost may be an empty file."""
    root = write_folder(tmp_path / "data", 2, 10, 2)
    fields = _folder_config(root, max_bad_images=1)
    with stopped_after_a_save(monkeypatch):
        loop.run(fields, tmp_path / "run")
    lost = root / "train" / "class01" / "003.jpg"
    lost.unlink()
    sources.cache_clear()  # as in another process
    with pytest.raises(WorkdirError, match=r"on 20 training and 4 test images, and folder:.* has 19 and 4 now"):
        loop.run(fields, tmp_path / "run")
    lost.write_bytes(b"")
    sources.cache_clear()
    done = loop.run(fields, tmp_path / "run")
    assert done["skipped_images"]
    lost.unlink()
    sources.cache_clear()
    assert loop.run(fields, tmp_path / "run")["final_accuracy"] == done["final_accuracy"]  # nothing is left to order


def test_there_are_as_many_threads_as_cores_where_a_system_knows_no_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    fields = _folder_config(write_folder(tmp_path, 2, 8, 4))
    assert build_trainer(build_spec(fields)).pipeline.num_threads == 3


def test_one_bad_image_too_many_ends_the_run_with_its_name(tmp_path):
    root = write_folder(tmp_path / "data", 2, 8, 2)
    (root / "train" / "class01" / "003.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"003.jpg cannot be used: .*--config.max_bad_images=10"):
        loop.run(_folder_config(root), tmp_path / "run")


def test_fields_at_odds_with_the_data_set_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config.streaming is set, but digits is only read"):
        build_spec(validate(base(streaming=True)))
    with pytest.raises(ConfigError, match=r"config.min_crop_area is 0.5, but digits is kept on the devices"):
        build_spec(validate(base(min_crop_area=0.5)))
    with pytest.raises(DataError, match=r"digits has images of \(8, 8, 1\) and cannot be cut"):
        build_spec(validate(base(image_size=32)))
    root = write_folder(tmp_path, 2, 2, 1)
    with pytest.raises(ConfigError, match=r"config\.mean has 1 numbers"):
        build_spec(_folder_config(root, mean=(0.5,)))


def test_the_next_batch_is_on_the_devices_while_a_step_works_on_another(tmp_path):
    """As `TrainingPlan.ahead_bytes` counts it: two feeds, of which the step's own is its argument."""
    fields = _folder_config(write_folder(tmp_path, 2, 22, 4))
    trainer = build_trainer(build_spec(fields))
    place, held = trainer.pipeline.place, []

    def seen(feed):
        placed = place(feed)
        alive = (a.nbytes for a in jax.live_arrays() if a.dtype == np.uint8 and a.shape == placed.images.shape)
        held.append(sum(alive))
        return placed

    trainer = dataclasses.replace(trainer, pipeline=dataclasses.replace(trainer.pipeline, place=seen))
    train_epoch(trainer, trainer.data_parallel.replicate(trainer.spec.init_state()), 0, Metrics.empty())
    devices = jax.device_count()
    planned = plan_training(fields, "cpu", devices)
    assert max(held) == 2 * (planned.ahead_bytes * devices - 4 * fields.batch_size)  # but labels
    assert planned.peak_bytes >= planned.step.peak_bytes + planned.ahead_bytes


def test_a_streamed_run_plans_its_batches_and_not_the_data_set():
    """ImageNet's 190 GB of pixels are no argument of the step; a batch of uint8 images and labels is."""
    fields = {"dataset": "imagenet2012", "image_size": 32, "batch_size": 8, "width_multiplier": 0.125}
    found = plan_training(validate(base(**fields, min_crop_area=0.08)), "cpu", devices=1)
    state = build_spec(validate(base(**fields)), 1).state_template()
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # And the number of steps.
    assert found.step.argument_bytes == pytest.approx(kept + 8 * 32 * 32 * 3 + 8 * 4 + 4, abs=64)
    assert found.test_bytes == 0
