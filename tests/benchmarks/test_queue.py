"""Processes that share a study: no run twice, no record lost, and what a dead one held goes on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks._results import Store
from benchmarks.paper import experiments, pages, queue, reproduce
from mimicnorm_jax.training import lock_workdir
from tests.conftest import ROOT, in_processes

ARMS = tuple(experiments.Arm("net", f"m{i}", {"model": "net", "method": f"m{i}"}) for i in range(7))


def finish(command):
    """Leaves what train.py leaves in the folder of a finished run; the run's name."""
    fields = dict(part.removeprefix("--config.").split("=", 1) for part in command if part.startswith("--config."))
    folder = Path(command[-1].removeprefix("--workdir="))
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": "net", "method": fields["method"], "init_scheme": "published", "learning_rate": 0.1}
    (folder / "summary.json").write_text(json.dumps({"config": config, "machine": {}}))
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    row = dict.fromkeys(names, 0.5) | {"seconds": 1.0, "epoch": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return fields["method"]


def share(folder, train):
    """Runs what is missing of a study of `ARMS` in a folder; whether all is done."""
    tiny = reproduce.replace(experiments.EXPERIMENTS["table1"], arms=ARMS)
    flags = ["table1", f"--workdir={folder / 'runs'}", f"--results={folder / 'results'}"]
    reproduce.EXPERIMENTS, reproduce.train = {"table1": tiny}, train
    arguments = reproduce.make_parser().parse_args(flags)
    return reproduce.run(arguments, reproduce.make_study("table1", False, None, "float32"))


def test_two_that_share_a_study_do_every_run_once(tmp_path, monkeypatch):
    """Locks are of open files, so two threads stand in for processes; each waits in its first run for the other."""
    monkeypatch.setattr(pages.plots, "available", lambda: False)
    for name in ("EXPERIMENTS", "train"):
        monkeypatch.setattr(reproduce, name, getattr(reproduce, name))
    both, trained, starts = threading.Barrier(2), [], itertools.count()

    def train(command, remaining):
        del remaining
        if next(starts) < 2:
            both.wait(60)
        trained.append(finish(command))
        return 0

    with ThreadPoolExecutor(2) as pool:
        ends = [future.result() for future in [pool.submit(share, tmp_path, train) for _ in range(2)]]
    assert any(ends)
    assert sorted(trained) == [arm.method for arm in ARMS]
    records = (tmp_path / "results" / "table1.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["arm"] for line in records) == [arm.method for arm in ARMS]


def test_a_run_is_kept_from_others_by_its_claim_and_by_the_training_that_outlives_it(tmp_path):
    folder = tmp_path / "runs" / "a-seed0"
    held = queue.claim(folder)
    assert queue.claim(folder) is None
    assert queue.claim(tmp_path / "runs" / "a-seed1") is not None
    held.close()
    with lock_workdir(folder):
        assert queue.claim(folder) is None
    queue.claim(folder).close()


def test_no_record_is_lost_when_several_add_at_once(tmp_path):
    store = Store("example", lambda record: record["number"])

    def add(start):
        for number in range(start, 60, 3):
            store.add(tmp_path, {"number": number})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert set(store.read(tmp_path)) == set(range(60))


DRIVER = """
import os, sys, time
from pathlib import Path
from benchmarks.paper import pages
from tests.benchmarks import test_queue
pages.plots.available = lambda: False
folder, hangs = Path(sys.argv[1]), sys.argv[2] == "hangs"
def train(command, remaining):
    method = test_queue.finish(command)
    with (folder / "trained").open("a") as log:
        log.write(f"{method} {os.getpid()}\\n")
    time.sleep(1000 if hangs else 0.02)
    return 0
sys.exit(not test_queue.share(folder, train))
"""


@in_processes
@pytest.mark.slow
def test_what_a_killed_process_held_is_taken_by_the_next_and_what_a_living_one_holds_is_not(tmp_path):
    def start(how):
        command = [sys.executable, "-c", DRIVER, str(tmp_path), how]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def trained():
        path = tmp_path / "trained"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    hanging = start("hangs")
    try:
        while not trained():
            assert hanging.poll() is None
            time.sleep(0.05)
        pair = [start("goes on") for _ in range(2)]
        # The rest is under way elsewhere, they say.
        assert [process.wait(300) for process in pair] == [1, 1]
        assert sorted(method for method, _ in trained()) == [arm.method for arm in ARMS]
    finally:
        os.kill(hanging.pid, signal.SIGKILL)
        hanging.wait()
    assert start("goes on").wait(300) == 0
    (held, _), (again, _) = trained()[0], trained()[-1]
    assert held == again
    records = (tmp_path / "results" / "table1.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["arm"] for line in records) == [arm.method for arm in ARMS]
