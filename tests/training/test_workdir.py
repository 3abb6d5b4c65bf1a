"""One run at a time in a folder, also after the death of the last."""

import subprocess
import sys

import pytest

from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import config, loop, workdir

HOLD = """
import sys, time
from pathlib import Path
from mimicnorm_jax.training import workdir
with workdir.lock(Path(sys.argv[1])):
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
        holder.wait()
    with workdir.lock(tmp_path):
        pass
