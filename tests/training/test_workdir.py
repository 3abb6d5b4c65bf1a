"""One run at a time in a folder, also after the death of the last."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from mimicnorm_jax.errors import ConfigError, WorkdirError
from mimicnorm_jax.training import config, lock_workdir, loop, read_config, read_metrics
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


def test_fields_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    """In a run's folder alone, and no field that there is not."""
    fields = config.validate(config.base(epochs=7))
    saved = dataclasses.asdict(fields)
    del saved["logit_scale"], saved["scalar_rate"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path) == fields
    (tmp_path / "config.json").write_text(json.dumps(saved | {"epoch": 3}))
    with pytest.raises(ConfigError, match="did you mean epochs"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkdirError, match=r"config.json is damaged: it does not hold a JSON object with fields"):
        read_config(tmp_path)


def test_a_run_that_ended_before_its_first_checkpoint_leaves_its_folder_to_another(tmp_path, monkeypatch):
    fields = config.validate(config.base(model="short", batch_size=512, epochs=1, warmup_epochs=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.run(fields, tmp_path)
    other = dataclasses.replace(fields, learning_rate=0.05)
    assert loop.run(other, tmp_path)["final_accuracy"] > 0
    assert read_config(tmp_path) == other
    with pytest.raises(WorkdirError, match=r"learning_rate is 0\.05 there and 0\.1 here"):
        loop.run(fields, tmp_path)


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
