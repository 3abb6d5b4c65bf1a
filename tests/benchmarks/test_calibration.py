"""How sure a network is, how often right, and what a temperature mends."""

import json
import math

import numpy as np
import pytest

from benchmarks.paper import calibration


def test_calibration_of_hand_made_answers():
    """Confidences 1/2 (right) and 3/4 (right, wrong): apart by 1/2 of one image and by 1/2 of two."""
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.15, 0.75, 0.1], [0.1, 0.15, 0.75]], np.float32))
    bins = calibration.reliability(logits, np.array([0, 1, 0]))
    assert bins["accuracy"] == pytest.approx(2 / 3)
    assert bins["loss"] == pytest.approx(-math.log(0.5 * 0.75 * 0.1) / 3, rel=1e-5)
    assert calibration.expected_calibration_error(bins) == pytest.approx((0.5 + abs(1 - 1.5)) / 3, rel=1e-5)
    assert sum(bins["count"]) == 3
    modest, wrong = (calibration.reliability(logits[part], np.array([0])) for part in (slice(1), slice(2, 3)))
    assert calibration.overconfidence(modest) == pytest.approx(-0.5, rel=1e-5)
    assert calibration.overconfidence(wrong) == pytest.approx(0.75, rel=1e-5)


def test_a_confidence_of_one_is_in_the_last_bin():
    bins = calibration.reliability(np.array([[1000.0, 0.0]], np.float32), np.array([0]))
    assert bins["count"][-1] == 1
    assert bins["loss"] == 0.0


def test_a_temperature_is_found_again_and_mends_what_it_spoiled():
    """Labels are drawn from a softmax whose logits are then shrunk: too modest, as under a BatchNorm without scale."""
    rng = np.random.default_rng(0)
    honest = 2.0 * rng.standard_normal((20_000, 10))
    labels = (honest + rng.gumbel(size=honest.shape)).argmax(1)
    found = calibration.temperature_scaling(0.25 * honest, labels)
    # 10,000 images tell the temperature of their own loss to about 1 %.
    assert found["temperature"] == pytest.approx(0.25, rel=0.05)
    assert calibration.overconfidence(found["before"]) < -0.2
    assert abs(calibration.overconfidence(found["after"])) < 0.02
    assert found["after"]["accuracy"] == found["before"]["accuracy"]
    assert found["after"]["loss"] == pytest.approx(
        calibration.reliability(honest[1::2], labels[1::2])["loss"], abs=2e-3
    )


def test_a_network_that_does_not_answer_as_its_run_did_is_refused(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text(json.dumps({"final_accuracy": 0.5}))
    monkeypatch.setattr(calibration._process, "measure", lambda *_: {"accuracy": 0.52})
    with pytest.raises(SystemExit, match=r"0\.52, and 0\.5 by its own"):
        calibration.of_run(tmp_path)
