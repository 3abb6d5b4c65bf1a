"""A streamed run on real photographs through kills, stops, other numbers of threads and two processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mimicnorm_jax.training import build_spec, read_config, read_metrics
from mimicnorm_jax.training.resilience import Checkpoints
from tests.conftest import ROOT, in_processes
from tests.data.photographs import write_folder

pytestmark = [
    in_processes,
    pytest.mark.slow,
    # Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EPOCHS = 3


def _start(folder, root, threads, *flags, devices=2):
    """`resnet8`, a quarter as wide, on 2,000 photographs of 20 classes cut to 32 x 32."""
    fields = {
        "dataset": f"folder:{root}",
        "image_size": 32,
        "batch_size": 80,
        "width_multiplier": 0.25,
        "model": "resnet8",
    }
    fields |= {"epochs": EPOCHS, "decoding_threads": threads, "dtype": "float32", "learning_rate": 0.02}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    # JAX reads what another process has half written.
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / (folder.name if flags else ""))}
    command = [sys.executable, "train.py", "--config=configs/imagefolder.py", *given, f"--workdir={folder}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)


def _finished(process, code=0):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def _reached(process, folder, epochs):
    """Waits until a process has written a line for an epoch beyond `epochs`."""
    deadline = time.monotonic() + 400
    while len(read_metrics(folder)) <= epochs:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _interrupt(process, folder, epochs, seconds, sent):
    """Signals a process so many seconds after it has reached an epoch beyond `epochs`."""
    _reached(process, folder, epochs)
    time.sleep(seconds)
    assert process.poll() is None, "the run ended before it could be interrupted"
    process.send_signal(sent)
    process.communicate(timeout=200)


def _state(folder):
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        found = checkpoints.restore_newest(build_spec(read_config(folder), 1).state_template())
    assert found is not None
    state, metadata = found
    assert metadata.epoch == EPOCHS
    return state


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _pair(folder, root):
    """Two processes with a device each; their exit codes and what they printed."""
    shared = [f"--coordinator=127.0.0.1:{_port()}", "--processes=2"]
    pair = [_start(folder / f"pair{i}", root, 1, *shared, f"--process_id={i}", devices=1) for i in (0, 1)]
    outputs = [process.communicate(timeout=500)[0] for process in pair]
    return [process.returncode for process in pair], "\n".join(outputs)


def test_killed_and_stopped_runs_end_in_the_same_bits_and_two_processes_in_the_same_numbers(tmp_path):
    root = write_folder(tmp_path / "data", 20, 80, 20)
    _finished(_start(tmp_path / "whole", root, 1))
    whole = _state(tmp_path / "whole")

    parts = tmp_path / "parts"
    _interrupt(_start(parts, root, 1), parts, 0, 0.3, signal.SIGKILL)
    reached = len(read_metrics(parts))
    assert reached < EPOCHS
    _interrupt(_start(parts, root, 1), parts, reached - 1, 0.0, signal.SIGTERM)
    _finished(_start(parts, root, 1))
    jax.tree.map(np.testing.assert_array_equal, whole, _state(parts))

    for threads in (4,):
        other = tmp_path / f"threads{threads}"
        _finished(_start(other, root, threads))
        jax.tree.map(np.testing.assert_array_equal, whole, _state(other))

    codes, outputs = _pair(tmp_path, root)
    if "Gloo context initialization failed" in outputs:
        # Gloo waits 30 s for the other process to have compiled, which a crowded machine exceeds; now it is cached.
        codes, outputs = _pair(tmp_path, root)
    assert codes == [0, 0], outputs
    # Two devices' gradients add up to the same in any order; how Gloo adds is not promised.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, _state(tmp_path / "pair0"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_interrupt_from_the_keyboard_leaves_no_process_and_no_shared_memory(tmp_path):
    root, folder = write_folder(tmp_path / "data", 20, 80, 20), tmp_path / "run"
    process = _start(folder, root, 4)
    _reached(process, folder, 0)
    shared = [line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "/dev/shm/" in line]
    assert [line for line in shared if not line.endswith("(deleted)")] == []  # that goes with the process
    _interrupt(process, folder, 0, 0.0, signal.SIGINT)
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="makes a named pipe")
def test_an_interrupt_while_the_disk_stalls_saves_and_ends_the_process(tmp_path):
    """A pipe into which nobody writes stands in an image's place, so that a thread hangs in the system's call."""
    root, folder = write_folder(tmp_path / "data", 20, 80, 20), tmp_path / "run"
    process = _start(folder, root, 2)
    _reached(process, folder, 0)
    for path in sorted(root.glob("train/class07/*.jpg")):
        path.unlink()
        os.mkfifo(path)
    time.sleep(3)
    assert process.poll() is None
    assert len(read_metrics(folder)) < EPOCHS
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "asked to stop, and not waiting for data" in output
    step = int(output.rsplit("stopped by SIGINT after step ", 1)[1].split(":")[0])
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest == step >= 20
