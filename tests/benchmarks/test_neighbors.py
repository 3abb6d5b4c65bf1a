"""The table of neighbors says what records say, and that there are none."""

import numpy as np
import pytest

from benchmarks import binary, search
from benchmarks.neighbors import NOT_RUN, neighbors_table
from benchmarks.paper import reproduce


def test_what_has_no_records_was_not_run_and_what_has_says_so(tmp_path):
    rows = neighbors_table(tmp_path).splitlines()[2:]
    assert len(rows) == 9
    assert all(NOT_RUN in row for row in rows)
    run = dict(zip(binary.Run._fields, ("small", "bnn_mimic", 2, 0), strict=True))
    binary.STORE.add(tmp_path, run | {"ended": "", "curve": [{"test_accuracy": 0.625}]})
    rows = [row for row in neighbors_table(tmp_path).splitlines()[2:] if NOT_RUN not in row]
    assert len(rows) == 1
    assert "small, bnn_mimic 62.50 %" in rows[0]


def test_a_rival_is_judged_by_the_longest_training_that_there_is(tmp_path):
    def add(name, small, accuracy):
        study = reproduce.make_study(name, small, None, "float32")
        arm = next(a for a in study.experiment.arms if a.method == "ws_gn")
        config = {**arm.fields, "learning_rate": 0.05, "width_multiplier": 1.0}
        curve = [{"epoch": 1, "test_accuracy": accuracy}]
        study.store.add(tmp_path, {"config": config, "seed": 0, "ended": "", "curve": curve})

    for name, small, accuracy, said in (
        ("baselines", True, 0.25, "3 epochs: 25"),
        ("convergence", False, 0.5, "30 epochs: 50"),
    ):
        add(name, small, accuracy)
        (row,) = (row for row in neighbors_table(tmp_path).splitlines() if "`ws_gn`" in row)
        assert f"resnet8, {said}.00 % (batchnorm not run yet)" in row
        assert row.count("epochs:") == 1


def test_tau_is_scipys_with_ties_and_in_every_draw():
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    generator = np.random.default_rng(0)
    first, second = generator.integers(6, size=30), generator.integers(9, size=30)
    chosen = generator.integers(30, size=(20, 30))
    expected = [kendalltau(first[draw], second[draw]).statistic for draw in chosen]
    np.testing.assert_allclose(search.kendall(first, second, chosen), expected, atol=1e-6)


def test_operations_are_judged_by_the_accuracies_of_their_networks():
    records = []
    for network, accuracy in enumerate([0.1, 0.4, 0.3, 0.2]):
        key = dict(zip(search.NAMES, ("small", "trained", "batchnorm", network, 0), strict=True))
        records.append(key | {"accuracy": accuracy, "flops": network})
    found = search.predictors(records, "small", "batchnorm")["operations"]
    # of the six pairs three agree, and three do not
    assert found.tau == 0
    assert found.interval[0] < 0 < found.interval[1]
