"""Networks trained to the end: their statistics, the order of their runs, their page, and kills on the way."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.paper import comparison, convergence, last_norm, pages, queue, reproduce, why
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.paired import Paired, paired
from mimicnorm_jax import models
from mimicnorm_jax.functional.logits import BatchStatistics, running_averages
from mimicnorm_jax.init_schemes import SCHEMES, KernelSpec
from tests.conftest import ROOT, in_processes

ARMS = EXPERIMENTS["convergence"].arms
BINS = {"count": [0, 4, 6], "confidence": [0.0, 1.0, 3.0], "correct": [0, 2, 3]}


def _record(arm, seed, accuracy, ended=""):
    rows = [
        {"epoch": i, "test_accuracy": a, "train_accuracy": a, "test_loss": 1.5, "train_loss": 1.4, "seconds": 10.0}
        for i, a in ((1, accuracy / 2), (2, accuracy + 0.01), (3, accuracy))
    ]
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in arm.fields.items()}
    config = {"init_scheme": "published", **fields}
    record = {
        "arm": arm.method,
        "seed": seed,
        "ended": ended,
        "curve": [] if ended else rows,
        "config": config,
        "machine": {},
    }
    return record if ended else record | {"calibration": BINS}


def _first(method, net="resnet8"):
    return next(arm for arm in ARMS if (arm.net, arm.method) == (net, method))


def test_intervals_are_students():
    """For one and two degrees of freedom the quantile has a closed form."""
    two = Paired({0: 1.0, 1: 3.0})
    assert two.half_width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    three = Paired({0: 1.0, 1: 2.0, 2: 4.0})
    # Deviations -4/3, -1/3 and 5/3 of the mean 7/3.
    error = math.sqrt(42 / 9 / 2 / 3)
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * error
    assert three.interval == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-9)
    assert str(three) == "+2.33 [-1.46, +6.13]"


def test_intervals_hold_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(5.0, 2.0, (2000, 3))
    held = [abs(p.mean - 5.0) <= p.half_width for p in (Paired(dict(enumerate(row))) for row in draws)]
    # Three standard deviations of a share of 0.95 in 2,000 draws: 0.0146.
    assert np.mean(held) == pytest.approx(0.95, abs=0.0146)


def test_pairs_are_of_one_seed_and_one_alone_or_a_lost_run_gives_no_interval():
    a, b = _first("mimicnorm"), _first("batchnorm")
    theirs = [_record(b, seed, 0.6 + seed / 10) for seed in (0, 1, 2)]
    ours = [_record(a, 2, 0.81), _record(a, 1, 0.69), _record(a, 7, 0.1)]
    assert paired(ours, theirs, comparison.final).by_seed == pytest.approx({1: -1.0, 2: 1.0})
    assert str(paired(ours[:1], theirs, comparison.final)) == "+1.00 (seed 2 only: no interval)"
    lost = [ours[0], _record(a, 1, 0.0, ended="the loss is nan at step 3")]
    apart = paired(lost, theirs, comparison.final)
    assert apart.by_seed[1] == pytest.approx(comparison.CHANCE - 70.0)
    assert str(apart) == "-34.00 (a run ended early: no interval)"
    assert paired(ours[2:], theirs, comparison.final) is None


def test_whole_comparisons_of_the_methods_of_interest_come_first():
    order, records = [], []
    while found := queue.next_run(ARMS, None, records, lambda *_: False, math.inf):
        arm, seed = found
        records.append(_record(arm, seed, 0.5))
        order.append((arm.net, arm.method, arm.fields["learning_rate"], seed))
    four = ("batchnorm", "mimicnorm", "none", "none, he")
    assert order[:4] == [("resnet8", method, 0.05, 0) for method in four]
    assert order[4:10] == [("resnet8", method, 0.05, seed) for seed in (1, 2) for method in four[:3]]
    assert {method for _, method, _, _ in order[10:28]} == {"weightmean", "lastbn", "skipinit", "fixup", "nf", "ws_gn"}
    assert {(method, rate, seed) for _, method, rate, seed in order[28:34]} == {
        (method, rate, 0) for method in four[:2] for rate in (0.02, 0.1, 0.2)
    }
    assert order[34:38] == [("squeezenet", method, 0.05, seed) for seed in (0, 1) for method in four[:2]]
    assert order[38:40] == [("resnet8", method, 0.05, 0) for method in ("groupnorm", "dyt")]
    tried = [
        ("resnet8", arm.method, 0.05, seed) for seed in (0, 1, 2) for arm in ARMS if arm.against and seed in arm.seeds
    ]
    assert order[40:] == tried
    assert len(set(order)) == len(order)


def _written(folder, *records):
    study = reproduce.make_study("convergence", False, None, "float32")
    study.store.add(folder, *records)
    pages.write(study, folder)
    return (folder / "convergence.md").read_text()


def test_a_page_says_what_may_be_concluded_from_what_there_is(tmp_path):
    a, b, none, he = map(_first, ("mimicnorm", "batchnorm", "none", "none, he"))
    assert "Nothing yet" in _written(tmp_path)
    assert "Nothing yet" in _written(tmp_path, _record(b, 0, 0.6))
    page = _written(tmp_path, _record(a, 0, 0.58))
    assert "with MimicNorm 2.00 points below BatchNorm (seed 0 only: no interval): final test accuracies 58" in page
    assert "Others" not in page
    assert "2 of 50 runs are finished" in page
    assert "| mimicnorm | 0 | 59.00 | 2 | 58.00 | -2.00 (seed 0 only: no interval) |  | 1.500 | 10.00 |" in page
    assert "60.00 |  | +2.00 (seed 0 only: no interval) | 1.500 |" in page
    more = [_record(b, 1, 0.62), _record(a, 1, 0.60), _record(none, 0, 0.3), _record(none, 1, 0.3)]
    page = _written(tmp_path, *more, _record(he, 0, 0.2))
    # Differences -2 and -2.
    assert "paired over seeds 0, 1; 95 % interval -2.00 to -2.00, which excludes 0" in page
    assert "(weight centering alone)" not in page
    methods = ("weightmean", "mimicnorm, logit_scale=2.0", "nf")
    half, surer, worse = (
        _record(_first(method), 0, accuracy) for method, accuracy in zip(methods, (0.65, 0.6, 0.5), strict=True)
    )
    # `none` is better where both initializations have run; then all its seeds count. Differences -28 and -30.
    below = "below it `none` (the better of two initializations by test accuracy, seed 0) -29.00"
    assert f"in the ResNet-8, in points: {below}." in page
    one = "`weightmean` (weight centering alone) +7.00 (seed 0 only)"
    assert f"in points: {below}; by one seed alone {one}." in _written(tmp_path, half)
    # Differences 7 and 7.5, whose interval is 4.07 to 10.43; 2 and -30; -8 alone.
    more = [_record(_first("weightmean"), 1, 0.675), surer, _record(_first(methods[1]), 1, 0.3), worse]
    above = "above it (95 % interval without 0) `weightmean` (weight centering alone) +7.25"
    open_, alone = "`mimicnorm, logit_scale=2.0` -14.00", "`nf` -8.00 (seed 0 only)"
    rest = f"not told from it by these seeds {open_}; by one seed alone {alone}"
    assert f"in points: {above}; {below}; {rest}." in _written(tmp_path, *more)
    squeezed = [_record(_first(method, "squeezenet"), 0, 0.7) for method in ("batchnorm", "mimicnorm")]
    assert "After 20 epochs of CIFAR-100 a SqueezeNet ends with MimicNorm 0.00 points above" in _written(
        tmp_path, *squeezed
    )


def test_an_experiment_with_schedules_of_its_own_is_of_its_own_epochs():
    with pytest.raises(SystemExit, match="epochs=7"):
        reproduce.make_study("convergence", False, 7, "float32")
    drops = {arm.fields["epochs"]: arm.fields["decay_epochs"] for arm in ARMS}
    assert drops == {30: (16, 22, 27), 20: (11, 15, 18)}


def test_arms_that_ask_why_change_one_field_and_have_records_of_their_own():
    changes = [why.changed(arm, home) for arm, home in why.pairs(ARMS)]
    assert changes == [
        {"logit_scale": (1.0, 2.0)},
        {"logit_scale": (1.0, 3.0)},
        {"adaptive_clip": (0.0, 0.01)},
        {"warmup_epochs": (1.0, 5.0)},
        {"init_scheme": ("published", "exact")},
        {"init_scheme": ("published", "text")},
        {"decay_scalars": (True, False)},
        {"scalar_rate": (1.0, 0.1)},
    ]
    study = reproduce.make_study("convergence", False, None, "float32")
    records = [_record(arm, 0, 0.5) for arm in ARMS]
    assert len({study.store.key(record) for record in records}) == len(ARMS)
    assert all(len(found) == 1 for _, found in study.runs(records))


def test_the_exact_scheme_changes_scalars_alone_where_the_published_variance_is_hes():
    """As the page says of resnet8."""
    published = models.registry.ARCHITECTURES["resnet8"].published
    kernels = [KernelSpec(shape, centered=True) for shape in ((3, 3, 16, 16), (3, 3, 16, 32), (1, 1, 32, 64))]
    ours, exact, text = (SCHEMES[name] for name in ("published", "exact", "text"))
    for kernel in kernels:
        assert exact.conv(published, kernel) == ours.conv(published, kernel) != text.conv(published, kernel)
    gain = kernels[0].gain
    assert [s.scalar(kernels[:1] * 2, 3) for s in (ours, exact, text)] == pytest.approx(
        [1.2**2 / 3, gain**2 / 3, 1 / math.sqrt(3)]
    )


def test_the_table_of_reasons_is_of_pairs_and_says_what_was_not_run():
    study = reproduce.make_study("convergence", False, None, "float32")
    assert why.table(study, []).count("not run") == (8 + 4) + (1 + 1)
    warmup, home = next(pair for pair in why.pairs(ARMS) if "warmup" in pair[0].method)
    evaluated = {rule: {"accuracy": 0.5, "loss": 2.0} for rule in last_norm.RULES}
    evaluated["unbiased"] = {"accuracy": 0.5, "loss": 1.99}
    evaluated["test images"] = {"accuracy": 0.515, "loss": 2.0}
    records = [_record(home, seed, 0.5) | {"last_norm": evaluated} for seed in (0, 1)]
    table = why.table(study, [*records, _record(warmup, 0, 0.53)])
    assert "| mimicnorm | nothing |  |  | 0, 1 | 50.00 ± 0.00 |" in table
    assert "| mimicnorm | `warmup_epochs` | 1.0 | 5.0 | 0 | 53.00 | +3.00 | +0.0000 |" in table
    assert "times B / (B - 1) | 0, 1 | 50.00 ± 0.00 | +0.00 ± 0.00 | -0.0100 ± 0.0000 |" in table
    assert "test images themselves | 0, 1 | 51.50 ± 0.00 | +1.50 ± 0.00 | +0.0000 ± 0.0000 |" in table
    # The table of methods is of the arms that are compared with each other.
    assert {arm.method for arm, _ in convergence.home_groups(study, records)["resnet8"]} == {
        arm.method for arm in ARMS if arm.net == "resnet8" and not arm.against
    }


def test_statistics_of_the_last_norm_are_what_they_are_called():
    rng = np.random.default_rng(0)
    logits, test = rng.normal(2.0, 3.0, (5, 8, 3)), rng.normal(size=(20, 3))
    batches = last_norm.Moments(logits.mean(1), logits.var(1))
    start = last_norm.Moments(logits[0].mean(0), logits[0].var(0))
    found = last_norm.statistics(start, batches, 8, test)
    np.testing.assert_allclose(found["unbiased"].var, logits[0].var(0, ddof=1), rtol=1e-12)
    whole = logits.reshape(-1, 3)
    np.testing.assert_allclose(found["training images"], (whole.mean(0), whole.var(0)), rtol=1e-12)
    np.testing.assert_allclose(found["test images"], (test.mean(0), test.var(0)), rtol=1e-12)
    running = tuple(start)
    for mean, var in zip(*batches, strict=True):
        batch = BatchStatistics(mean, var, 8)
        running = running_averages(*running, batch, last_norm.MOMENTUM, "biased")
    np.testing.assert_allclose(found["momentum"], running, rtol=1e-12)


def test_rates_compare_one_seed_and_hold_the_run_of_the_main_table():
    study = reproduce.make_study("convergence", False, None, "float32")
    arms = [arm for arm in ARMS if arm.method == "mimicnorm" and arm.net == "resnet8"]
    records = [_record(arm, seed, arm.fields["learning_rate"] + seed / 2) for arm in arms for seed in (0, 1)]
    assert "| mimicnorm | 2.00 | 5.00 | 10.00 | 20.00 |" in convergence.rates(study, records)


DRIVER = """
import sys
from dataclasses import replace
from benchmarks.paper import reproduce
full = reproduce.EXPERIMENTS["convergence"]
tiny = {"dataset": "digits", "width_multiplier": 0.125, "epochs": 12, "decay_epochs": (9,)}
arms = tuple(replace(a, fields={**a.fields, **tiny}, seeds=(0,)) for a in full.arms[1:2])
reproduce.EXPERIMENTS = {"convergence": replace(full, arms=arms)}
reproduce.main()
"""


@in_processes
@pytest.mark.slow
def test_kills_at_any_time_change_nothing_and_cost_nothing_that_was_saved(tmp_path):
    """The command and what it started are killed once 2, 5 and 8 epochs are saved, and started again."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    quick |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def start(name):
        flags = [f"--workdir={tmp_path / name}", f"--results={tmp_path / name / 'results'}"]
        command = [sys.executable, "-c", DRIVER, "convergence", *flags]
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | quick, stdout=log, start_new_session=True)

    def lines():
        # Not a search of the whole tree: checkpoints are renamed while this looks.
        return sum(len(path.read_text().splitlines()) for path in (tmp_path / "killed").glob("*/*/metrics.jsonl"))

    def saved():
        # One that is not whole yet has another name.
        steps = (int(path.name) for path in (tmp_path / "killed").glob("*/*/checkpoints/*") if path.name.isdecimal())
        return max(steps, default=0) // 11

    def resumed():
        return [
            line for line in (tmp_path / "killed.log").read_text().splitlines() if line.startswith("resuming after")
        ]

    assert start("whole").wait(300) == 0
    reached = []
    for starts, least in enumerate((2, 5, 8)):
        process = start("killed")
        try:
            # A slow look may find so many epochs before this process has begun.
            while saved() < least or len(resumed()) < starts:
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reached.append((saved(), lines()))
    assert start("killed").wait(300) == 0
    found = [int(line.rpartition("epoch ")[2]) for line in resumed()]
    for epoch, (whole_until, logged) in zip(found, reached, strict=True):
        # An epoch is logged while the one before it may still be written, and that waited for its own predecessor.
        assert epoch >= max(whole_until, logged - 2)
    study = reproduce.make_study("convergence", False, None, "float32")
    whole, killed = (next(iter(study.store.read(tmp_path / name / "results").values())) for name in ("whole", "killed"))
    for record in (whole, killed):
        for row in record["curve"]:
            del row["seconds"], row["images_per_second"]
    assert len(whole["curve"]) == 12
    assert killed["curve"] == whole["curve"]
    assert killed["calibration"] == whole["calibration"]
    assert killed["last_norm"] == whole["last_norm"]
