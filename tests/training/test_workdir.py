"""One run at a time in a folder, also after the death of the last."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import config, lock_workdir, loop, read_metrics
from mimicnorm_jax.training.resilience import Checkpoints
from mimicnorm_jax.training.writers import JsonlWriter

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

resource = pytest.importorskip("resource")

HOLD = """
import sys, time
from pathlib import Path
from mimicnorm_jax.training import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        message = rf"{tmp_path} is in use by process {holder.pid} on .*: wait until that run ends"
        with pytest.raises(WorkdirError, match=message):
            loop.run(config.validate(config.base()), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    finally:
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, what):
    """A limit on the size of files stands in for the disk's end where checkpoints are written."""
    fields = config.validate(
        config.base(model="short", width_multiplier=0.5, batch_size=512, epochs=3, warmup_epochs=1.0)
    )
    loop.run(fields, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner, name = {"checkpoint": (Checkpoints, "save"), "metrics": (JsonlWriter, "append")}[what]
    write, calls = getattr(owner, name), []

    def full(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 and what == "metrics":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        write(self, *arguments)

    monkeypatch.setattr(owner, name, full)
    try:
        with pytest.raises(WorkdirError, match=r"no space left to write to .* the same command goes on"):
            loop.run(fields, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    loop.run(fields, tmp_path / "full")
    rows, expected = (read_metrics(tmp_path / name) for name in ("full", "whole"))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["test_loss"] for row in rows] == [row["test_loss"] for row in expected]
