"""Several processes on this machine, with gloo between them: the same numbers as one, and no hanging when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mimicnorm_jax import distributed
from mimicnorm_jax.errors import ConfigError, PeerError
from mimicnorm_jax.training import read_metrics
from tests.conftest import ROOT, in_processes

CASES = ("pmap mimicnorm sync", "pmap batchnorm alone", "shard_map mimicnorm alone", "shard_map batchnorm sync")
STEPS = """
import sys
import jax, numpy as np, optax
from functools import partial
from mimicnorm_jax import distributed, models
from mimicnorm_jax.data.augment import Augmentation
from mimicnorm_jax.data.pipeline import Selection, gather_batch
from mimicnorm_jax.training.parallel import DataParallel
from tests.training.runs import create_state
from mimicnorm_jax.training.step import AXIS, StepConfig

port, processes, process, out, *cases = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4 // int(processes))
if int(processes) > 1:
    distributed.connect(f"127.0.0.1:{port}", int(processes), int(process))
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 256, (63, 8, 8, 1)).astype(np.uint8), rng.integers(0, 5, 63).astype(np.int32)
mine = distributed.process_slice(63)
data = tuple(distributed.allgather_rows(rows[mine], 63) for rows in (images, labels))
np.testing.assert_array_equal(data[0], images)
found = {}
for case in cases:
    parallelism, method, sync = case.split()
    axis = AXIS if sync == "sync" else None
    model = models.create("resnet8", method=method, num_classes=5, width=0.25, axis_name=axis).clone(stages=(1,))
    config = StepConfig(model, optax.sgd(0.02, momentum=0.9), Augmentation(1, True, 10.0), (0.5,), (0.25,))
    state = create_state(model, config.tx, (8, 8, 1), seed=0, ema=False)
    data_parallel = DataParallel(tuple(jax.devices()), parallelism)
    state, data_there = data_parallel.replicate((distributed.broadcast_from_first(state), data))
    step = data_parallel.make_train_steps(config, partial(gather_batch, (8, 8, 1)))
    local = list(data_parallel.local_devices)
    for i in range(20):
        index = np.random.default_rng(i).permutation(63)[:32].astype(np.int32).reshape(4, 1, 8)
        state, metrics = step(state, data_there, Selection(index[local]), 1)
        jax.block_until_ready(metrics)
    for i, leaf in enumerate(jax.tree.leaves(jax.device_get((state, metrics)))):
        found[f"{case} {i}"] = np.asarray(leaf)
np.savez(f"{out}.{processes}.{process}.npz", **found)
"""


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(arguments, devices):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
    )


@in_processes
@pytest.mark.slow
def test_two_processes_of_two_devices_do_the_steps_of_one_process_of_four(tmp_path):
    port = _port()
    runs = [_start(["-c", STEPS, port, n, i, tmp_path / "out", *CASES], 4 // n) for n, i in ((1, 0), (2, 0), (2, 1))]
    for process in runs:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    one, *two = (np.load(tmp_path / f"out.{name}.npz") for name in ("1.0", "2.0", "2.1"))
    assert {name.rsplit(" ", 1)[0] for name in one} == set(CASES)
    for name in one:
        for other in two:
            # Float32 sums over devices in another order, after 20 steps.
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


FLAGS = (
    "--config.width_multiplier=0.25",
    "--config.epochs=16",
    "--config.diagnostics_epochs=4",
    "--config.batch_size=128",
    "--config.ema_decay=0.9",
)


# Shorter than for users; on a busy machine some seconds without a sign of life are usual.
TRAIN = (
    "import mimicnorm_jax.distributed as d; d.HEARTBEAT_TIMEOUT_S = 30; "
    "from mimicnorm_jax.cli.train import main; import sys; sys.exit(main())"
)


def _pair(folder):
    port = _port()
    shared = ["-c", TRAIN, *FLAGS, f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [_start([*shared, f"--process_id={i}", f"--workdir={folder if i == 0 else 'nowhere'}"], 2) for i in (0, 1)]


def _wait_for_an_epoch(folder, epochs, processes):
    """For one after the `epochs` that others did before: until then the processes may not even have met."""
    deadline = time.monotonic() + 200
    while len(read_metrics(folder)) <= epochs:
        assert time.monotonic() < deadline, "no epoch in time"
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.02)


def _assert_it_said_why(process, output):
    """Either a step failed, which train.py names, or JAX ended the process after a minute without signs of life."""
    assert process.returncode in (4, -signal.SIGABRT), output
    assert "cannot go on with the others" in output or "another task died" in output


def _learned(folder):
    """All of the metrics but for what is measured by the clock."""
    learned = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [{name: row[name] for name in learned} for row in read_metrics(folder)]


def _killed(process):
    process.communicate(timeout=120)
    return process.returncode == -signal.SIGKILL


@in_processes
@pytest.mark.slow
def test_when_one_of_two_processes_ends_so_does_the_other_and_both_go_on_together(tmp_path):
    """A kill of the second, a request to stop, a kill of the first; the metrics are those of an uninterrupted pair."""
    folder = tmp_path / "pair"
    pair = _pair(folder)
    _wait_for_an_epoch(folder, 1, pair)
    pair[1].kill()
    output, _ = pair[0].communicate(timeout=120)
    _assert_it_said_why(pair[0], output)
    assert _killed(pair[1])

    done, pair = len(read_metrics(folder)), _pair(folder)
    _wait_for_an_epoch(folder, done, pair)
    pair[1].send_signal(signal.SIGTERM)  # either one
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], outputs
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert "stopped by SIGTERM after step" in outputs[0]

    done, pair = len(read_metrics(folder)), _pair(folder)
    _wait_for_an_epoch(folder, done, pair)
    pair[0].kill()
    output, _ = pair[1].communicate(timeout=120)
    _assert_it_said_why(pair[1], output)
    assert _killed(pair[0])

    pair = _pair(folder)
    outputs = [process.communicate(timeout=200)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "resuming after step" in outputs[0]
    assert "best test accuracy" not in outputs[1]  # the first one speaks for both
    whole = _pair(tmp_path / "whole")
    alone = _start(["train.py", *FLAGS, f"--workdir={tmp_path / 'alone'}"], 4)
    for process in (*whole, alone):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    rows, expected, of_one = (_learned(path) for path in (folder, tmp_path / "whole", tmp_path / "alone"))
    assert [row["epoch"] for row in rows] == list(range(1, 17))
    assert rows == expected
    # Float32 sums over devices in another order: training makes 1e-7 of the first epoch 1e-4 of the second.
    np.testing.assert_allclose(rows[0]["train_loss"], of_one[0]["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(rows[-1]["test_loss"], of_one[-1]["test_loss"], rtol=0.05)
    diagnostics = [json.loads(line)["epoch"] for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
    assert diagnostics == [0, 4, 8, 12, 16]
    assert not (ROOT / "nowhere").exists()


@pytest.mark.slow
def test_who_waits_too_long_for_another_process_ends_with_a_message():
    waiting = """
import time
from mimicnorm_jax import distributed
with distributed.stall_watchdog(2.0) as progress:
    for _ in range(8):
        time.sleep(0.25)
        progress()
    print("still there", flush=True)
    time.sleep(60)
"""
    process = _start(["-c", waiting], 1)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 4
    assert "still there" in output
    assert "process 0 of 1 has not done a step for 2 s: another one is late" in output


def test_every_row_is_read_by_one_process(monkeypatch):
    for processes in (1, 2, 3, 7, 11):
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        shares = []
        for i in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda i=i: i)
            shares += distributed.process_slice(10)
        assert shares == list(range(10))


def test_who_cannot_join_says_what_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match=r"--coordinator=HOST:PORT.*--distributed"):
        distributed.connect("127.0.0.1:1", 2, 2)

    def failing():
        with distributed.translate_peer_errors():
            raise jax.errors.JaxRuntimeError("connection reset")

    with pytest.raises(jax.errors.JaxRuntimeError):
        failing()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(PeerError, match="connection reset"):
        failing()
