"""Whole runs on digits: interrupted and resumed, failing, evaluated; on all four (fake) devices."""

import dataclasses
import json
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from mimicnorm_jax.data import datasets
from mimicnorm_jax.errors import ConfigError, DataError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.training import config, evaluate_checkpoints, loop, parallel, report, spec, step, trainer
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.resilience.checkpoints import Checkpoints
from mimicnorm_jax.training.resilience.nonfinite import NonFiniteMonitor
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError
from mimicnorm_jax.training.writers import read_metrics
from tests.conftest import also

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _config(**fields):
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


def _final(folder, fields):
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        assert checkpoints.latest is not None
        return checkpoints.restore(checkpoints.latest, spec.build_spec(fields).state_template())


def _trainer(fields):
    return trainer.build_trainer(spec.build_spec(fields))


def _timeless(rows):
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """The folder of an uninterrupted run of two epochs, which traced each step once."""
    folder = tmp_path_factory.mktemp("whole")
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "eval_step"):
            patch.setattr(step, name, chex.assert_max_traces(getattr(step, name), n=1))
        loop.run(_config(), folder)
    return folder


def _assert_same_run(whole, parts, fields):
    """To the bit."""
    (state, record), (other_state, other) = (_final(folder, fields) for folder in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert record == other
    assert _timeless(read_metrics(whole)) == _timeless(read_metrics(parts))
    best = []
    for folder in (whole, parts):
        with Checkpoints(folder / "checkpoints", 2) as checkpoints:
            best.append(checkpoints.best)
    assert best[0] == best[1]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch):
    fields = _config()
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


def test_an_epoch_in_groups_is_the_epoch_in_single_steps_and_compiles_once(monkeypatch):
    """22 steps are two groups of eight and one of six."""
    original, traced = step.train_step, []
    monkeypatch.setattr(step, "train_step", lambda *args: traced.append(1) or original(*args))
    found = {}
    for steps in (1, 8):
        run = _trainer(_config(rotation=0.0, steps_per_call=steps))
        state = run.data_parallel.replicate(run.spec.init_state())
        traced.clear()
        found[steps] = jax.device_get(loop.train_epoch(run, state, 0, Metrics.empty()))
        assert len(traced) == 1
        assert found[steps][0].step == run.steps_per_epoch == 22
    # The compiler orders float32 sums by itself in a loop's body, and 22 steps amplify it.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found[1], found[8])


def test_a_non_finite_loss_in_the_midst_of_a_group_names_its_step():
    run = _trainer(_config(steps_per_call=8))
    state = run.spec.init_state()
    state = state.replace(step=state.step + run.steps_per_epoch)
    losses = np.ones(8)
    losses[5] = np.nan

    def train_steps(state, resident, feeds, num_steps):
        return state, Metrics(losses, np.ones(8), np.ones(8))

    with pytest.raises(NonFiniteLossError, match=r"not finite at step 28 \(epoch 2\)") as raised:
        loop.train_epoch(dataclasses.replace(run, train_steps=train_steps), state, 1, Metrics.empty())
    assert raised.value.where["step"] == 28
    # What may be left out is not counted, and a finite loss starts the count of steps in a row afresh.
    losses[3] = np.nan
    patient = dataclasses.replace(run, train_steps=train_steps, nonfinite=NonFiniteMonitor(1))
    total = loop.train_epoch(patient, state, 1, Metrics.empty())[1]
    assert total.count == 22 - 6  # two of each group of at most eight


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
    fields = _config()
    sent = _signalled_at(at, monkeypatch)
    with pytest.raises(InterruptedRunError, match=f"stopped by SIGTERM after step {at}: the same command") as stopped:
        loop.run(fields, tmp_path)
    assert [stopped.value.signal] == sent
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert len(read_metrics(tmp_path)) == epochs
    loop.run(fields, tmp_path)
    _assert_same_run(whole, tmp_path, fields)


def test_a_signal_at_the_last_step_of_all_leaves_a_finished_run(tmp_path, monkeypatch, capsys):
    fields = _config(epochs=1)
    sent = _signalled_at(22, monkeypatch)
    summary = loop.run(fields, tmp_path)
    assert sent == [signal.SIGTERM]
    monkeypatch.undo()
    assert summary["final_accuracy"] == loop.run(fields, tmp_path)["final_accuracy"]
    assert "this run is complete" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 1


def test_a_finished_run_trains_no_further_and_another_config_is_refused(whole, tmp_path, capsys):
    fields = _config()
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


def test_eval_only_gives_the_logged_accuracy_and_that_of_plain_code(whole):
    fields = _config()
    results = evaluate_checkpoints(fields, whole)
    rows = read_metrics(whole)
    assert results["latest"]["test_accuracy"] == rows[-1]["test_accuracy"]
    assert results["best"]["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    state, _ = _final(whole, fields)
    dataset = datasets.load("digits")
    images = np.float32((dataset.test.images / 255 - dataset.mean) / dataset.std)
    logits = spec.build_spec(fields).model.apply(state.eval_variables, images, train=False)
    accuracy = float((np.asarray(logits).argmax(1) == dataset.test.labels).mean())
    # 360 images fill no whole number of batches of 64; one answer on the edge may turn in float32.
    assert abs(accuracy - rows[-1]["test_accuracy"]) < 1.5 / 360


@pytest.mark.slow
def test_default_config_learns_digits(tmp_path):
    """A third of the default's epochs; 97 % is far below what any seed gave, far above what a fault leaves."""
    from configs import digits

    fields = digits.get_config()
    fields.epochs = 10
    summary = loop.run(config.validate(fields), tmp_path)
    assert summary["best_accuracy"] > 0.97
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "metrics.jsonl", "config.json", "checkpoints"}


def test_centering_after_the_step_trains_like_centering_in_the_call_from_the_first_step_on(tmp_path):
    losses = {}
    for centering in ("in_call", "after_step"):
        loop.run(_config(epochs=1, centering=centering), tmp_path / centering)
        losses[centering] = [row["train_loss"] for row in read_metrics(tmp_path / centering)]
    # The same algorithm for SGD. Float32's rounding, 1e-7, grows with every step (a second epoch ends at 1e-3).
    np.testing.assert_allclose(losses["in_call"], losses["after_step"], rtol=2e-5)


@pytest.mark.slow
def test_bfloat16_activations_train_like_float32_and_leave_the_state_in_float32(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        fields = _config(epochs=2, dtype=dtype, clip_norm=5.0, centering="after_step")
        loop.run(fields, tmp_path / dtype)
        losses[dtype] = [row["train_loss"] for row in read_metrics(tmp_path / dtype)]
        state, _ = _final(tmp_path / dtype, fields)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    assert losses["bfloat16"] != losses["float32"]
    # Activations to 2^-9 over ten layers; seeds of the same run differ by more.
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)


def test_too_many_non_finite_steps_in_a_row_stop_the_run(tmp_path, capsys):
    fields = _config(learning_rate=1e30, warmup_epochs=0.0, method="none", max_consecutive_nonfinite=3)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 5 .* as were those of 3 steps before"):
        loop.run(fields, tmp_path)
    assert capsys.readouterr().out.count("left out (") == 3


def test_a_run_goes_on_with_another_number_of_devices(whole, tmp_path, monkeypatch):
    fields = _config()

    def with_devices(count):
        every = parallel.DataParallel

        def fewer(devices, parallelism):
            return every(devices[:count], parallelism)

        monkeypatch.setattr(trainer.parallel, "DataParallel", fewer)

    def stop(self, state, metadata, save=Checkpoints.save):
        save(self, state, metadata)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            loop.run(fields, tmp_path)
    with_devices(1)
    loop.run(fields, tmp_path)
    rows = [read_metrics(folder) for folder in (whole, tmp_path)]
    for name in ("train_loss", "test_loss"):
        four, fewer = ([row[name] for row in found] for found in rows)
        assert four[0] == fewer[0]
        # Float32 sums in another order, after 22 steps.
        np.testing.assert_allclose(fewer[1], four[1], rtol=1e-3)


def test_a_non_finite_loss_stops_with_a_message_and_a_report(tmp_path):
    fields = _config(learning_rate=1e30, warmup_epochs=0.0, method="none")
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 2 \(epoch 1\).*learning_rate.*failure.json"):
        loop.run(fields, tmp_path)
    report = json.loads((tmp_path / "failure.json").read_text())
    assert report["config"]["learning_rate"] == 1e30
    assert (report["step"], report["epoch"]) == (2, 1)
    assert report["learning_rate"] == pytest.approx(1e30)
    # The state is the one before the step that failed: the first step's update threw the kernels up.
    assert float(report["norms"]["params/stem/conv/kernel"]) > 1e25


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"batch_size": 66}, ConfigError, "batch_size is 66, which 4 devices cannot share"),
        ({"batch_size": 4, "sync_bn": False}, ConfigError, "one image for each of 4 devices"),
        ({"microbatches": 3}, ConfigError, "microbatches is 3, into which the 16 images of each .* divisor of 16"),
        ({"microbatches": 16, "method": "batchnorm"}, ConfigError, "microbatches is 16.*'batchnorm'.* at most 8"),
        ({"batch_size": 2000}, ConfigError, "more than the 1437 training images"),
        ({"model": "vgg16"}, ConfigError, "config.model='vgg16'.* needs at least 32 x 32"),
        ({"model": "resnt18"}, ConfigError, "did you mean resnet18"),
        ({"method": "batchnrm"}, ConfigError, "did you mean batchnorm"),
        ({"model": "squeezenet", "method": "fixup"}, ConfigError, "fixup is about residual branches"),
        (
            {"method": "batchnorm", "centering": "after_step"},
            ConfigError,
            "centering is 'after_step', but .* no kernel",
        ),
        ({"init_scheme": "xavier"}, ConfigError, "config.init_scheme='xavier'.* is one of published"),
        ({"dataset": "digit"}, DataError, "did you mean digits"),
        ({"dataset": "cifar100", "data_dir": "/nowhere"}, DataError, "not prepared under /nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(fields, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "create_state", lambda *a: pytest.fail("compiled something"))
    with pytest.raises(error, match=message):
        loop.run(_config(**fields), tmp_path / "new")
    if "2000" not in message:
        assert not (tmp_path / "new" / "checkpoints").exists()


def test_the_headline_says_what_microbatches_do_to_the_gradient(tmp_path):
    for method, said in (("batchnorm", "not the gradient of the whole batch"), ("lastbn", ": the gradient of the")):
        run = _trainer(_config(method=method, microbatches=4))
        line = report.headline(run, run.spec.state_template(), tmp_path)
        assert "each in 4 microbatches of 4 images a device" in line
        assert said in line
    run = _trainer(_config())
    assert "microbatches" not in report.headline(run, run.spec.state_template(), tmp_path)


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot write to the workdir"):
        loop.run(_config(), tmp_path / "file" / "run")


def test_eval_only_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="no checkpoint"):
        evaluate_checkpoints(_config(), tmp_path)


@pytest.mark.slow
@pytest.mark.cifar100
def test_a_run_on_real_cifar100(tmp_path, cifar100_dir):
    """Two epochs of 2,000 images lower the loss below that of guessing by frequency, log 100."""
    fields = config.base(
        dataset="cifar100", data_dir=cifar100_dir, epochs=4, batch_size=64, learning_rate=0.05, warmup_epochs=0.5
    )
    loop.run(config.validate(fields), tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["train_loss"] < np.log(100)
