"""Measuring in a fresh process: with environment variables and peaks of memory of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks._results import ROOT, Record


def measure(module: str, *case: str, **variables: str) -> Record | int:
    """What `python -m benchmarks.MODULE --measure CASE` prints last, or its exit code where it fails.

    Args:
      module: below `benchmarks`.
      case: texts that tell it what to measure.
      variables: of its environment, besides this process's.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--measure", *case]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode or json.loads(done.stdout.splitlines()[-1])


def train(workdir: Path, **fields: Any) -> Any:
    """Runs train.py with these fields, as a user starts it, and gives what `os.wait4` says that its process used.

    Args:
      workdir: of the run.
      fields: of the config.

    Raises:
      SystemExit: if it fails.
    """
    command = [sys.executable, "train.py", *(f"--config.{name}={value}" for name, value in fields.items())]
    command.append(f"--workdir={workdir}")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return usage
