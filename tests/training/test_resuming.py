"""Whole runs on digits, interrupted and resumed, finished and evaluated."""

import dataclasses
import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from mimicnorm_jax.data import datasets
from mimicnorm_jax.errors import DataError, WorkdirError
from mimicnorm_jax.training import (
    averaged,
    evaluate_checkpoints,
    loop,
    moments,
    parallel,
    read_metrics,
    report,
    spec,
    step,
    trainer,
)
from mimicnorm_jax.training.resilience import Checkpoints, InterruptedRunError
from tests.conftest import also
from tests.training.runs import restored, small_config, stopped_after_a_save

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _timeless(rows):
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """The folder of an uninterrupted run of two epochs, which traced each step once."""
    folder = tmp_path_factory.mktemp("whole")
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((step, "train_step"), (step, "eval_step"), (moments, "sum_of_moved")):
            patch.setattr(module, name, chex.assert_max_traces(getattr(module, name), n=1))
        loop.run(small_config(), folder)
    return folder


def _assert_same_run(whole, parts, fields):
    """To the bit."""
    (state, record), (other_state, other) = (restored(folder, fields) for folder in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert record == other
    assert _timeless(read_metrics(whole)) == _timeless(read_metrics(parts))
    best = []
    for folder in (whole, parts):
        with Checkpoints(folder / "checkpoints", 2) as checkpoints:
            best.append(checkpoints.best)
    assert best[0] == best[1]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch):
    fields = small_config()
    evaluate, calls = loop.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(fields, tmp_path)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    # A line that was written for an epoch whose checkpoint was not.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "step": 44}) + '\n{"epoch": 3, "st')
    loop.run(fields, tmp_path)
    _assert_same_run(whole, tmp_path, fields)


def _signalled_at(at, monkeypatch):
    """Makes runs send themselves SIGTERM before one of their steps; what they sent."""
    build, sent = loop.build_trainer, []

    def build_signalled(spec):
        run = build(spec)
        calls = []

        def train_steps(*args):
            calls.append(args)
            if len(calls) == at:
                sent.append(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            return run.train_steps(*args)

        return dataclasses.replace(run, train_steps=train_steps)

    monkeypatch.setattr(loop, "build_trainer", build_signalled)
    return sent


@pytest.mark.parametrize(("at", "epochs"), [(5, 0), also(22, 1)])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch, at, epochs):
    """After 5 of the first epoch's 22 steps, and after the last, when the epoch is brought to its end."""
    fields = small_config()
    sent = _signalled_at(at, monkeypatch)
    with pytest.raises(InterruptedRunError, match=f"stopped by SIGTERM after step {at}: the same command") as stopped:
        loop.run(fields, tmp_path)
    assert [stopped.value.signal] == sent
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert len(read_metrics(tmp_path)) == epochs
    state, _ = restored(tmp_path, fields)
    run = trainer.build_trainer(spec.build_spec(fields))
    # What stands in the checkpoint is of the averaged parameters there, in mid-epoch too.
    again = averaged.with_own_statistics(run, run.data_parallel.replicate(state), 0)
    jax.tree.map(np.testing.assert_array_equal, state.ema_batch_stats, again.ema_batch_stats)
    loop.run(fields, tmp_path)
    _assert_same_run(whole, tmp_path, fields)


def test_a_signal_in_an_evaluation_saves_at_once(whole, tmp_path, monkeypatch):
    """Whoever sent it may kill the process before the evaluation ends."""
    fields = small_config()
    evaluate = loop.evaluate

    def killed(run, state, stop):
        signal.raise_signal(signal.SIGTERM)
        evaluate(run, state, stop)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(fields, tmp_path)
    monkeypatch.undo()
    assert int(restored(tmp_path, fields)[0].step) == 22
    loop.run(fields, tmp_path)
    _assert_same_run(whole, tmp_path, fields)


def test_the_seconds_of_an_interrupted_epoch_are_those_of_both_parts(tmp_path, monkeypatch):
    fields = small_config(epochs=1)
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with monkeypatch.context() as patch:
        _signalled_at(5, patch)
        with pytest.raises(InterruptedRunError):
            loop.run(fields, tmp_path)
    assert restored(tmp_path, fields)[1].seconds == 10
    loop.run(fields, tmp_path)  # asks after 10 s for the speed, and after 20 for the line
    (row,) = read_metrics(tmp_path)
    assert row["seconds"] == 30


def test_a_stopped_run_is_saved_also_where_no_data_is_left_to_estimate_statistics_from(tmp_path, monkeypatch):
    fields = small_config()
    _signalled_at(3, monkeypatch)

    def no_data(*_):
        raise DataError("asked to stop, and not waiting for data")

    monkeypatch.setattr(loop, "with_own_statistics", no_data)
    with pytest.raises(InterruptedRunError, match="after step 3"):
        loop.run(fields, tmp_path)
    state, _ = restored(tmp_path, fields)
    assert state.step == 3
    jax.tree.map(np.testing.assert_array_equal, state.ema_batch_stats, spec.build_spec(fields).init_state().batch_stats)


def test_a_signal_at_the_last_step_of_all_leaves_a_finished_run(tmp_path, monkeypatch, capsys):
    fields = small_config(epochs=1)
    sent = _signalled_at(22, monkeypatch)
    summary = loop.run(fields, tmp_path)
    assert sent == [signal.SIGTERM]
    monkeypatch.undo()
    assert summary["final_accuracy"] == loop.run(fields, tmp_path)["final_accuracy"]
    assert "this run is complete" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 1


def test_a_finished_run_trains_no_further_and_another_config_is_refused(whole, tmp_path, capsys):
    fields = small_config()
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    # Another number of checkpoints changes no number of the run.
    again = loop.run(dataclasses.replace(fields, keep_checkpoints=3), tmp_path)
    assert "this run is complete" in capsys.readouterr().out
    rows = read_metrics(tmp_path)
    assert again["final_accuracy"] == rows[-1]["test_accuracy"]
    assert rows == read_metrics(whole)
    with pytest.raises(WorkdirError, match=r"learning_rate is 0.1 there and 0.2 here.*Choose another --workdir"):
        loop.run(dataclasses.replace(fields, learning_rate=0.2), tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(WorkdirError, match=r"config.json is damaged"):
        loop.run(fields, tmp_path)


class _Looking:
    """A hook that keeps what it is called with."""

    rows = ()

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, *given):
        self.seen.append(given)


def test_a_finished_run_keeps_its_summary_and_names_lost_metrics(whole, tmp_path):
    """Memory, machine and skipped images are those of the process that trained."""
    folder = shutil.copytree(whole, tmp_path / "run")
    summary = folder / report.SUMMARY
    trained = json.loads(summary.read_text()) | {"peak_host_bytes": 1, "skipped_images": {"x.jpg": "cannot be read"}}
    summary.write_text(json.dumps(trained))
    assert loop.run(small_config(), folder) == trained
    assert json.loads(summary.read_text()) == trained
    seen = []
    loop.run(small_config(), folder, make_hook=lambda *_: _Looking(seen))
    assert [(step, num_steps) for _, step, num_steps in seen] == [(44, 0)]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(seen[0][0]))
    summary.write_text("[")
    assert loop.run(small_config(), folder).keys() == trained.keys() - {"skipped_images"}
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(WorkdirError, match=r"complete run without the lines of metrics.jsonl: restore that file"):
        loop.run(small_config(), folder)


def test_eval_only_gives_the_logged_accuracy_and_that_of_plain_code(whole):
    fields = small_config()
    results = evaluate_checkpoints(fields, whole)
    rows = read_metrics(whole)
    assert results["latest"]["test_accuracy"] == rows[-1]["test_accuracy"]
    assert results["best"]["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    state, _ = restored(whole, fields)
    dataset = datasets.load("digits")
    images = np.float32((dataset.test.images / 255 - dataset.mean) / dataset.std)
    logits = spec.build_spec(fields).model.apply(state.eval_variables, images, train=False)
    accuracy = float((np.asarray(logits).argmax(1) == dataset.test.labels).mean())
    # 360 images fill no whole number of batches of 64; one answer on the edge may turn in float32.
    assert abs(accuracy - rows[-1]["test_accuracy"]) < 1.5 / 360


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(whole, tmp_path, monkeypatch):
    fields = small_config()

    def with_devices(count):
        every = parallel.DataParallel

        def fewer(devices, parallelism):
            return every(devices[:count], parallelism)

        monkeypatch.setattr(trainer.parallel, "DataParallel", fewer)

    with stopped_after_a_save(monkeypatch):
        loop.run(fields, tmp_path)
    with_devices(1)
    loop.run(fields, tmp_path)
    rows = [read_metrics(folder) for folder in (whole, tmp_path)]
    for name in ("train_loss", "test_loss"):
        four, fewer = ([row[name] for row in found] for found in rows)
        assert four[0] == fewer[0]
        # Float32 sums in another order, after 22 steps.
        np.testing.assert_allclose(fewer[1], four[1], rtol=1e-3)


def test_eval_only_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="no checkpoint"):
        evaluate_checkpoints(small_config(), tmp_path)
