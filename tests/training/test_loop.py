"""Whole runs on digits: in groups of steps, failing, refused; on all four (fake) devices."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import ConfigError, DataError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.training import Metrics, config, loop, read_metrics, report, spec, step, train_epoch, trainer
from mimicnorm_jax.training.resilience.nonfinite import NonFiniteMonitor
from tests.training.runs import restored, small_config

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _trainer(fields):
    return trainer.build_trainer(spec.build_spec(fields))


def test_an_epoch_in_groups_is_the_epoch_in_single_steps_and_compiles_once(monkeypatch):
    """22 steps are two groups of eight and one of six."""
    original, traced = step.train_step, []
    monkeypatch.setattr(step, "train_step", lambda *args: traced.append(1) or original(*args))
    found = {}
    for steps in (1, 8):
        run = _trainer(small_config(rotation=0.0, steps_per_call=steps))
        state = run.data_parallel.replicate(run.spec.init_state())
        traced.clear()
        found[steps] = jax.device_get(train_epoch(run, state, 0, Metrics.empty()))
        assert len(traced) == 1
        assert found[steps][0].step == run.steps_per_epoch == 22
    # The compiler orders float32 sums by itself in a loop's body, and 22 steps amplify it.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found[1], found[8])


def test_a_non_finite_loss_in_the_midst_of_a_group_names_its_step():
    run = _trainer(small_config(steps_per_call=8))
    state = run.spec.init_state()
    state = state.replace(step=state.step + run.steps_per_epoch)
    losses = np.ones(8)
    losses[5] = np.nan

    def train_steps(state, resident, feeds, num_steps):
        return state, Metrics(losses, np.ones(8), np.ones(8))

    with pytest.raises(NonFiniteLossError, match=r"not finite at step 28 \(epoch 2\)") as raised:
        train_epoch(dataclasses.replace(run, train_steps=train_steps), state, 1, Metrics.empty())
    assert raised.value.where["step"] == 28
    # What may be left out is not counted, and a finite loss starts the count of steps in a row afresh.
    losses[3] = np.nan
    patient = dataclasses.replace(run, train_steps=train_steps, nonfinite=NonFiniteMonitor(1))
    total = train_epoch(patient, state, 1, Metrics.empty())[1]
    assert total.count == 22 - 6  # two of each group of at most eight


@pytest.mark.slow
def test_default_config_learns_digits(tmp_path):
    """A third of the default's epochs; 97 % is far below what any seed gave, far above what a fault leaves."""
    from configs import digits

    fields = digits.get_config()
    fields.epochs = 10
    summary = loop.run(config.validate(fields), tmp_path)
    assert summary["best_accuracy"] > 0.97
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "metrics.jsonl", "config.json", "checkpoints"}


@pytest.mark.slow
def test_centering_after_the_step_trains_like_centering_in_the_call_from_the_first_step_on(tmp_path):
    losses = {}
    for centering in ("in_call", "after_step"):
        loop.run(small_config(epochs=1, centering=centering), tmp_path / centering)
        losses[centering] = [row["train_loss"] for row in read_metrics(tmp_path / centering)]
    # The same algorithm for SGD. Float32's rounding, 1e-7, grows with every step (a second epoch ends at 1e-3).
    np.testing.assert_allclose(losses["in_call"], losses["after_step"], rtol=2e-5)


@pytest.mark.slow
def test_bfloat16_activations_train_like_float32_and_leave_the_state_in_float32(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        fields = small_config(epochs=2, dtype=dtype, clip_norm=5.0, centering="after_step")
        loop.run(fields, tmp_path / dtype)
        losses[dtype] = [row["train_loss"] for row in read_metrics(tmp_path / dtype)]
        state, _ = restored(tmp_path / dtype, fields)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    assert losses["bfloat16"] != losses["float32"]
    # Activations to 2^-9 over ten layers; seeds of the same run differ by more.
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)


def test_too_many_non_finite_steps_in_a_row_stop_the_run(tmp_path, capsys):
    fields = small_config(learning_rate=1e30, warmup_epochs=0.0, method="none", max_consecutive_nonfinite=3)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 5 .* as were those of 3 steps before"):
        loop.run(fields, tmp_path)
    assert capsys.readouterr().out.count("left out (") == 3


def test_a_non_finite_loss_stops_with_a_message_and_a_report(tmp_path):
    fields = small_config(learning_rate=1e30, warmup_epochs=0.0, method="none")
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
        ({"method": "batchnrm", "logit_scale": 2.0}, ConfigError, "did you mean batchnorm"),
        ({"method": "batchnorm", "logit_scale": 2.0}, ConfigError, "logit_scale is 2, but .*'batchnorm' has no norm"),
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
    monkeypatch.setattr(spec, "first_state", lambda *a: pytest.fail("compiled something"))
    with pytest.raises(error, match=message):
        loop.run(small_config(**fields), tmp_path / "new")
    if "2000" not in message:
        assert not (tmp_path / "new" / "checkpoints").exists()


def test_the_headline_says_what_microbatches_do_to_the_gradient(tmp_path):
    for method, said in (("batchnorm", "not the gradient of the whole batch"), ("lastbn", ": the gradient of the")):
        run = _trainer(small_config(method=method, microbatches=4))
        line = report.headline(run, run.spec.state_template(), tmp_path)
        assert "each in 4 microbatches of 4 images a device" in line
        assert said in line
    run = _trainer(small_config())
    assert "microbatches" not in report.headline(run, run.spec.state_template(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "10 classes, logit_scale 1: no training loss below 0.28\n"),
        ({"logit_scale": 2.0}, "logit_scale 2: no training loss below 0.01\n"),
        ({"logit_scale": 5.0}, None),
        ({"method": "weightmean"}, None),
    ],
)
def test_the_headline_says_what_normalized_logits_bound(fields, said, tmp_path):
    run = _trainer(small_config(**fields))
    lines = report.headline(run, run.spec.state_template(), tmp_path)
    assert "no training loss" not in lines if said is None else said in lines


@pytest.mark.parametrize(
    ("fields", "said", "falls"),
    [
        ({"schedule": "step", "decay_epochs": (4, 9, 12)}, "of decay_epochs 9, 12 do not lie between the warm-up", 1),
        ({"warmup_epochs": 9.0}, "the warm-up, 9 epochs, is all of the run", 0),
        ({"decay_epochs": (4,), "schedule": "cosine"}, "schedule=cosine does not look at decay_epochs", None),
        ({"schedule": "step", "decay_epochs": (2, 8)}, None, 2),
    ],
)
def test_the_headline_says_what_of_the_schedule_never_comes(fields, said, falls, tmp_path):
    run = _trainer(small_config(**{"epochs": 9, "warmup_epochs": 2.0} | fields))
    lines = report.headline(run, run.spec.state_template(), tmp_path)
    assert "note" not in lines if said is None else f"\nnote: {said}" in lines
    rates = [run.learning_rate(step) for step in range(1, run.config.epochs * run.steps_per_epoch + 1)]
    if falls is not None:
        assert sum(late < early for early, late in itertools.pairwise(rates)) == falls


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot write to the workdir"):
        loop.run(small_config(), tmp_path / "file" / "run")


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
