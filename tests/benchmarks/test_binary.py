"""The study of binary networks: the order of its runs, what sets its steps apart, its page."""

import pytest

from benchmarks import binary
from benchmarks.binary import ARMS, Run
from mimicnorm_jax import models, training


def test_each_seed_is_a_whole_comparison_and_a_second_step_has_its_first():
    done, folders, order = set(), set(), []
    while run := binary.next_run("small", (0, 1), done.__contains__, folders.__contains__):
        assert run.step == 1 or run._replace(step=1) in folders
        order.append(run)
        done.add(run)
        folders.add(run)
    assert order == [Run("small", arm, step, seed) for seed in (0, 1) for arm in ARMS for step in (1, 2)]


def test_a_lost_first_step_is_trained_again():
    first, second = (Run("small", ARMS[0], step, 0) for step in (1, 2))
    assert binary.next_run("small", (0,), {first}.__contains__, lambda run: False) == first
    assert binary.next_run("small", (0,), {first}.__contains__, lambda run: True) == second


@pytest.mark.parametrize("form", binary.FORMS)
@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_differ_by_their_method_and_clipping_and_the_steps_by_the_published_recipe(form, arm, tmp_path):
    first, second = (binary.fields_of(Run(form, arm, step, 0), tmp_path) for step in (1, 2))
    for fields in (first, second):
        config = training.validate(training.base(**fields))
        models.create(config.model, method=config.method)
        reference = binary.fields_of(Run(form, "batchnorm", 1 if fields is first else 2, 0), tmp_path)
        apart = {name for name in fields if fields[name] != reference[name]}
        assert apart == (set() if arm == "batchnorm" else {"method", "adaptive_clip"} | (apart & {"init_from"}))
    assert {name for name in second if second[name] != first.get(name)} == {"model", "weight_decay", "init_from"}
    assert second["init_from"] == str(tmp_path / f"{form}-{arm}-1-0")


def test_the_page_pairs_second_steps_by_seed():
    def record(arm, step, seed, accuracy):
        row = {"epoch": 1, "test_accuracy": accuracy, "seconds": 7.0}
        sizes = {"packed_bytes": 1000, "stored_bytes": 30000}
        return Run("small", arm, step, seed)._asdict() | {"ended": "", "curve": [row], "machine": {}} | sizes

    records = [record("batchnorm", 2, seed, 0.20 + 0.01 * seed) for seed in (0, 1, 2)]
    records += [record("bnn_mimic", 2, seed, 0.22 + 0.01 * seed) for seed in (0, 1, 2)]
    text = binary.page(records)
    assert "+2.00 [+2.00, +2.00]" in text
    assert "| `bnn_nobn` | not run |" in text
    assert "reactnet18" not in text
