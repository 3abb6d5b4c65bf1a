"""Measuring in a fresh process: with environment variables and peaks of memory of its own."""

import json
import os
import subprocess
import sys

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
