"""The harness of the paper's tables: what it runs next, what it counts as done, what it writes."""

import math
import signal
import subprocess
import time

import pytest

pytest.importorskip("matplotlib")

from benchmarks.paper import comparison, pages, queue, reproduce
from benchmarks.paper.experiments import EXPERIMENTS, Accuracy, Arm, small_form
from tests.conftest import in_processes

ARMS = tuple(
    Arm(net, method, {"model": net, "method": method}) for net in "ab" for method in ("batchnorm", "mimicnorm")
)


def _record(net, method, seed, accuracies=(0.5,), seconds=100.0, **fields):
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    curve = [dict.fromkeys(names, v) | {"seconds": seconds, "epoch": i + 1} for i, v in enumerate(accuracies)]
    config = {"model": net, "method": method, "init_scheme": "published", "learning_rate": 0.1} | fields
    return {"seed": seed, "ended": "", "curve": curve, "config": config, "machine": {}}


def _order(records, seeds=(0, 1), begun=frozenset(), remaining=math.inf):
    """What would be run, one after another."""
    order = []
    while found := queue.next_run(ARMS, seeds, records, lambda arm, seed: (arm, seed) in map(tuple, begun), remaining):
        arm, seed = found
        order.append(f"{arm.net} {arm.method} {seed}")
        records = [*records, _record(arm.net, arm.method, seed)]
    return order


def test_whole_comparisons_first_all_networks_before_the_next_seed_and_nothing_twice():
    assert _order([]) == [
        "a batchnorm 0", "a mimicnorm 0", "b batchnorm 0", "b mimicnorm 0",
        "a batchnorm 1", "a mimicnorm 1", "b batchnorm 1", "b mimicnorm 1",
    ]  # fmt: skip
    done = [_record("a", "batchnorm", 0), _record("a", "mimicnorm", 0), _record("b", "mimicnorm", 1)]
    # What was begun goes first, even of a later seed.
    assert _order(done)[0] == "b batchnorm 1"
    assert not set(_order(done)) & {"a batchnorm 0", "a mimicnorm 0", "b mimicnorm 1"}
    assert _order([], begun=[(ARMS[3], 1)])[:2] == ["b mimicnorm 1", "b batchnorm 1"]


def test_a_comparison_known_not_to_fit_the_budget_comes_last():
    done = [_record("a", method, 0) for method in ("batchnorm", "mimicnorm")]
    assert _order(done, remaining=250.0)[0] == "b batchnorm 0"
    # Two runs of 100 s each do not fit into 150 s; what b takes is not known.
    done += [_record("b", method, 0, seconds=10.0) for method in ("batchnorm", "mimicnorm")]
    assert _order(done, remaining=150.0)[0] == "b batchnorm 1"
    assert _order(done, remaining=250.0)[0] == "a batchnorm 1"


def test_a_record_belongs_to_the_arm_whose_fields_it_has_and_to_no_other():
    arms = [*EXPERIMENTS["table2"].arms, *EXPERIMENTS["figure6"].arms]
    plain, he = (arm for arm in EXPERIMENTS["figure6"].arms if arm.method.startswith("none"))
    assert comparison.belongs(_record("vgg16", "none", 0, init_scheme="he"), he)
    assert not comparison.belongs(_record("vgg16", "none", 0, init_scheme="he"), plain)
    record = _record("vgg16", "weightmean", 2, learning_rate=0.5)
    assert [arm for arm in arms if comparison.belongs(record, arm) and "learning_rate" in arm.fields] == [
        arm for arm in arms if arm.fields == {"model": "vgg16", "method": "weightmean", "learning_rate": 0.5}
    ]
    assert not comparison.belongs(record, arms[0], seed=1)


def test_differences_are_in_joint_standard_errors():
    ours, paper = comparison.measured([70.0, 71.0, 72.0]), Accuracy(70.0, 0.3, 3)
    # 1 / sqrt((1^2 + 0.3^2) / 3) = 1.659
    assert comparison.difference(ours, paper) == "+1.00 (+1.7 SE)"
    assert comparison.difference(comparison.measured([70.0]), paper) == "+0.00"
    assert comparison.difference(None, paper) == ""


def test_a_page_shows_best_and_final_the_paper_and_what_was_not_run(tmp_path):
    records = [_record("vgg11", "batchnorm", seed, (0.6, 0.7, 0.65 + seed / 100)) for seed in (0, 1)]
    records.append(_record("vgg11", "none", 0, ()) | {"ended": "the loss is nan at step 3"})
    for record in records:
        record["config"]["batch_size"] = 256
    asked = reproduce.make_study("table1", False, None, "float32")
    asked.store.add(tmp_path, *records)
    pages.write(asked, tmp_path)
    page = (tmp_path / "table1.md").read_text()
    assert "2 of 16 rows have been run" in page
    assert "| vgg11 | 0.1 | batchnorm | 2 | 70.00 ± 0.00 | 65.50 ± 0.71 | 67.90 ± 0.14 | +2.10 (+26.0 SE) |" in page
    assert "| 1 | 1.00 | 1.00 | 65.33 ± 0.08 | -64.33 | -69.00 | -2.57 (-27.6 SE) | seed 0: the loss is nan" in page
    assert "| vgg16 |  | mimicnorm | not run |" in page


def _asked(arguments):
    return reproduce.make_study(arguments.experiment, arguments.small, arguments.epochs, arguments.dtype)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("epochs", [None, 7])
@pytest.mark.parametrize("dtype", reproduce.DTYPES)
def test_a_file_of_records_tells_which_form_of_which_experiment_it_is_of(small, epochs, dtype, tmp_path):
    asked = reproduce.make_study("table2", small, epochs, dtype)
    (tmp_path / f"{asked.name}.jsonl").touch()
    (tmp_path / "table3.jsonl").touch()
    assert {study.name for study in reproduce.studies(tmp_path)} == {*EXPERIMENTS, asked.name}
    assert asked in reproduce.studies(tmp_path)


@in_processes
@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(tmp_path, monkeypatch, capfd):
    """With train.py itself, on the digits."""
    arm = Arm("resnet8", "none", {"model": "resnet8", "method": "none", "width_multiplier": 0.125, "dataset": "digits"})
    tiny = reproduce.replace(EXPERIMENTS["table1"], arms=(arm,), epochs=8)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"table1": tiny})
    flags = ["table1", f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    arguments = reproduce.make_parser().parse_args(flags)
    asked = _asked(arguments)
    codes = []

    class OfOneEpoch(subprocess.Popen):
        """A process whose time is up when it has trained an epoch."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            while self.poll() is None and not any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    def interrupted(command, remaining, train=reproduce.train):
        del remaining
        codes.append(train(command, 60.0 if not codes else math.inf))
        return codes[-1]

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setattr(reproduce.subprocess, "Popen", OfOneEpoch)
    monkeypatch.setattr(reproduce, "train", interrupted)
    assert not reproduce.run(arguments, asked)
    assert reproduce.run(arguments, asked)
    assert codes == [128 + signal.SIGTERM, 0]
    (record,) = asked.store.read(tmp_path / "results").values()
    assert [row["epoch"] for row in record["curve"]] == list(range(1, 9))
    assert record["best_accuracy"] == max(row["test_accuracy"] for row in record["curve"])
    assert not any((tmp_path / "runs").glob("*/*-seed*"))
    monkeypatch.setattr(reproduce, "train", lambda *_: pytest.fail("repeated a finished run"))
    assert reproduce.run(arguments, asked)


@pytest.mark.parametrize(("text", "expected"), [("9m", 540.0), ("90s", 90.0), ("1h30m", 5400.0)])
def test_budgets(text, expected):
    assert reproduce.budget(text) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["table1", "--nets", "vgg12"], "vgg12.* 'vgg11'"),
        (["table1", "--small"], "no small form"),
        (["table2", "--methods", "fixup"], "fixup.* 'batchnorm'"),
    ],
)
def test_what_an_experiment_does_not_have_is_named(flags, message, tmp_path):
    arguments = reproduce.make_parser().parse_args([*flags, f"--results={tmp_path}", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match=message):
        reproduce.run(arguments, _asked(arguments))


def test_small_forms_differ_from_the_papers_only_by_what_they_say():
    full = EXPERIMENTS["table2"]
    form = small_form(full)
    assert [arm.method for arm in form.arms] == [arm.method for arm in full.arms]
    assert {arm.fields["learning_rate"] for arm in form.arms} == {arm.fields["learning_rate"] for arm in full.arms}
    assert not any(arm.published for arm in form.arms)
