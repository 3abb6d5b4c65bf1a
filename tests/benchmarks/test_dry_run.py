"""The dry run tries the programs that the command would run."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from benchmarks._results import RESULTS
from benchmarks.paper import dry_run, reproduce
from benchmarks.paper.experiments import EXPERIMENTS, Arm
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.training.workdir import as_json


def _config(study, arm, seed):
    return as_json(dry_run.config_of(reproduce.fields_of(study.experiment, arm, seed, 1)))


@pytest.mark.parametrize("name", ["table2", "figure6"])
def test_configs_are_those_that_finished_runs_had(name):
    study = reproduce.make_study(name, True, None, "float32")
    runs = study.runs(list(study.store.read(RESULTS).values()))
    checked = 0
    for arm, records in runs:
        for record in records:
            tried = _config(study, arm, record["seed"])
            # A record may be older than the newest fields; under a cosine the epochs of drops mean nothing.
            had = {field: value for field, value in record["config"].items() if field != "decay_epochs"}
            assert {field: tried[field] for field in had} == had
            checked += 1
    assert checked >= 18


def test_learning_rates_share_a_program_and_nothing_else_does():
    assert [arm.method for arm in dry_run.programs(EXPERIMENTS["table2"].arms)] == [
        "none", "weightmean", "mimicnorm", "batchnorm",
    ]  # fmt: skip
    assert len(dry_run.programs(EXPERIMENTS["table1"].arms)) == len(EXPERIMENTS["table1"].arms)


def test_an_epoch_has_whole_batches_to_train_on_and_all_images_to_test():
    @dataclass(frozen=True)
    class Part:
        bound_seconds: float

    plan = SimpleNamespace(step=Part(1.0), evaluation=Part(0.01))
    (arm, *_) = EXPERIMENTS["table2"].arms
    config = dry_run.config_of(dict(arm.fields))
    # 195 batches of 256 in 50,000 images, and 40 with the last one of 16 in 10,000.
    assert dry_run.Tried(arm, config, plan, "").bound_seconds == pytest.approx(195.4)


@pytest.mark.slow
def test_an_error_of_any_part_of_a_run_is_met_without_a_gpu():
    fields = {"model": "resnet8", "method": "mimicnorm", "width_multiplier": 0.125}
    checked = []
    arm = Arm("resnet8", "mimicnorm", fields)
    shown = dry_run.dry_run([arm], lambda arm: dict(arm.fields), lambda folder, arm: checked.append(folder))
    assert shown.splitlines()[-1].startswith("| resnet8 | mimicnorm | float32 | 256 | ")
    assert shown.endswith("| ran |")
    assert len(checked) == 1
    with pytest.raises(ConfigError, match="fixup"):
        dry_run.dry_run([Arm("vgg11", "fixup", {"model": "vgg11", "method": "fixup"})], lambda a: dict(a.fields), print)
    with pytest.raises(FileNotFoundError):
        dry_run.dry_run([arm], lambda arm: dict(arm.fields), lambda folder, _: (folder / "no.json").read_text())
