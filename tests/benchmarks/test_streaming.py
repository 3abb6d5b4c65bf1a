"""The benchmark of streaming compares within a round, and measures nothing twice."""

import argparse

import pytest

from benchmarks import _streaming, streaming


def _record(arm, workers, turn, **values):
    about = {"seconds": 4, "cores": 2, "machine": {"device": "cpu"}, "peak_mib": 100.0}
    return {"arm": arm, "workers": workers, "round": turn} | about | values


def test_a_ratio_is_to_decoding_alone_in_the_same_round_by_as_many():
    """The median of 0.9 and 0.8: of the medians it would be 0.83."""
    rates = {"decoding": {1: (50, 60), 2: (100, 200)}, "pipeline": {2: (90, 160)}}
    records = [
        _record(arm, workers, turn, images_per_second=rate)
        for arm, by_workers in rates.items()
        for workers, values in by_workers.items()
        for turn, rate in enumerate(values)
    ]
    assert "| the pipeline, threads | 2 | 2 | 125 | 90 to 160 | 0.85 |  | 100 |" in streaming.page(records)
    loop = _record("waiting", 2, 0, images_per_second=80.0, waited=0.015)
    growth = _record("growth", 2, 0, resident_mib=[230.0, 232.0])
    held = [_record("lock", 1, turn, held=share, cpu_ms=3.0) for turn, share in enumerate((0.1, 0.2, 0.3))]
    page = streaming.page([*records, loop, growth, *held])
    assert "at least 20% of an image's CPU time holds" in page
    assert "more than 5.0 cores" in page
    assert "gets 80 images/s and waits\n1.5% of the time" in page
    assert "after 1,000 batches: 230 MiB; after 10,000: 232 MiB" in page


def test_a_measurement_that_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    cases = []

    def measured(command):
        if len(cases) == 5:
            cases.append("stopped")
            raise KeyboardInterrupt
        cases.append(command)
        return {"images_per_second": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr(_streaming, "FILES", 8)
    monkeypatch.setattr(streaming, "_in_process", measured)
    arguments = argparse.Namespace(results=tmp_path, rounds=2, seconds=1, grain_python="", torch_python="python")
    with pytest.raises(KeyboardInterrupt):
        streaming.measure(arguments)
    assert len(streaming.STORE.read(tmp_path)) == 5
    streaming.measure(arguments)
    found = streaming.STORE.read(tmp_path)
    assert len(cases) - 1 == len(found)
    streaming.measure(arguments)
    assert len(cases) - 1 == len(found)
    assert sum(record["arm"] == "growth" for record in found.values()) == 1
    assert {record["round"] for record in found.values() if record["arm"] == "torch"} == {0, 1}
