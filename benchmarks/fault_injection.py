"""Fault injection: interrupts a training run again and again, and corrupts its checkpoints.

Trains a small network on digits twice: undisturbed, and stopped at random instants, in turn by SIGKILL, by SIGKILL
as soon as a save is seen under way, by SIGTERM, and by SIGTERM with SIGKILL within 0.3 s; then compares parameters,
bit for bit, and metrics. Then corrupts a file of the newest checkpoint of a copy in random ways and restores from it.
Writes results/fault_injection.jsonl and .md.

  python -m benchmarks.fault_injection --stops=80 --damages=20
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import _results
from benchmarks._results import ROOT, Record, Store
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.training import build_spec, read_config, read_metrics
from mimicnorm_jax.training.resilience import Checkpoints

PATIENCE = 120
ENDS = ("killed", "killed in a save", "asked", "asked, then killed")
STOPPED = 128 + signal.SIGTERM
"""The exit code of a run that SIGTERM stopped, with a checkpoint."""


def _start(folder: Path, epochs: int, cache: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "train.py",
        f"--workdir={folder}",
        f"--config.epochs={epochs}",
        "--config.width_multiplier=0.25",
    ]
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command.append("--config.keep_checkpoints=3")
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _saves(folder: Path) -> tuple[set[str], set[str]]:
    """Names of complete checkpoints, and of saves under way."""
    names = {path.name for path in (folder / "checkpoints").glob("*")}
    complete = {name for name in names if name.isdigit()}
    return complete, {name for name in names - complete if not name.startswith("damaged")}


def _live_until(end: str, process: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> int:
    """Ends the process in one of the ways of `ENDS`, at a random instant after it has saved; gives its exit code."""
    before, left_over = _saves(folder)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and _saves(folder)[0] <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    _wait(process, rng.uniform(0, 1.5))
    while end == "killed in a save" and process.poll() is None and not _saves(folder)[1] - left_over:
        time.sleep(0.0005)
    if end in ("asked", "asked, then killed"):
        process.send_signal(signal.SIGTERM)
        _wait(process, rng.uniform(0, 0.3) if end == "asked, then killed" else PATIENCE)
    if process.poll() is None:
        process.kill()
    return process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


def train_interrupted(folder: Path, stops: int, epochs: int, cache: Path, rng: random.Random) -> dict[str, int]:
    """Trains in a folder to the end, stopped up to `stops` times on the way: how often by what, and what was cut."""
    counts = {"SIGKILL": 0, "SIGTERM obeyed": 0, "in a save": 0}
    while True:
        process, left_over = _start(folder, epochs, cache), _saves(folder)[1]
        done = counts["SIGKILL"] + counts["SIGTERM obeyed"]
        code = _live_until(ENDS[done % len(ENDS)], process, folder, rng) if done < stops else None
        if code in (-signal.SIGKILL, STOPPED):
            counts["SIGTERM obeyed" if code == STOPPED else "SIGKILL"] += 1
            counts["in a save"] += bool(_saves(folder)[1] - left_over)
            continue
        if code == -signal.SIGTERM and len(read_metrics(folder)) == epochs:
            continue  # while it summed up, after all training was saved
        message = process.communicate()[1].decode()
        if process.returncode:
            sys.exit(f"a restart after {done} stops failed with {process.returncode}: {message}")
        return counts


def _outcome(folder: Path) -> tuple[Any, list[Record]]:
    """Final state, and metrics without times."""
    saved = read_config(folder)
    with Checkpoints(folder / "checkpoints", 3) as checkpoints:
        found = checkpoints.restore_newest(build_spec(saved).state_template())
    assert found is not None
    return found, [{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(folder)]


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of the newest checkpoint; says how."""
    steps = (path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    newest = max(steps, key=lambda path: int(path.name))
    path = rng.choice(sorted(file for file in newest.rglob("*") if file.is_file()))
    content = bytearray(path.read_bytes())
    kind = rng.choice(["truncated", "flipped", "deleted"])
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return f"{path.relative_to(newest).parts[0]} {kind}"


def survive(whole: Path, copy: Path, like: Any, good: dict[int, Any], rng: random.Random) -> tuple[str, str]:
    """Damages a copy and restores from it: what was done, and how it ended."""
    shutil.copytree(whole, copy)
    how = damage(copy, rng)
    try:
        with Checkpoints(copy / "checkpoints", 3) as checkpoints:
            found = checkpoints.restore_newest(like)
    except UserError as error:
        return how, f"refused: {error}"
    if found is None:
        return how, "WRONG: from scratch"
    step = int(found[0].step)
    same = jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), found[0], good[step]))
    if not same:
        return how, "WRONG: another state"
    return how, "harmless" if step == max(good) else "detected, the one before it used"


STORE = Store("fault_injection", lambda record: (record["epochs"], record["seed"]))


def inject(stops: int, damages: int, epochs: int, seed: int) -> Record:
    """One record: a run interrupted, and checkpoints corrupted."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        whole, parts = base / "whole", base / "parts"
        train_interrupted(whole, 0, epochs, base / "cache", rng)
        counts = train_interrupted(parts, stops, epochs, base / "cache", rng)
        (one, rows), (other, other_rows) = _outcome(whole), _outcome(parts)
        identical = jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one[0], other[0]))
        like, good = one[0], {}
        with Checkpoints(whole / "checkpoints", 3) as checkpoints:
            for path in (whole / "checkpoints").iterdir():
                if path.name.isdigit():
                    good[int(path.name)] = checkpoints.restore(int(path.name), like)[0]
        ends = [survive(whole, base / f"copy{i}", like, good, rng) for i in range(damages)]
    return counts | {
        "epochs": epochs,
        "seed": seed,
        "state_identical": identical,
        "record_identical": one[1] == other[1],
        "metrics_identical": rows == other_rows,
        "damages": ends,
        "machine": _results.machine(),
    }


def page(records: list[Record]) -> str:
    """What was injected and how it ended."""
    text = "# Fault injection\n"
    for record in records:
        about, state, metrics = record["machine"], record["state_identical"], record["metrics_identical"]
        where = f"seed {record['seed']}, {about['cores']} cores, jax {about['jax']}"
        stops = f"{record['SIGKILL']} times by SIGKILL and {record['SIGTERM obeyed']} times by SIGTERM"
        text += f"""
`python -m benchmarks.fault_injection`, {where}: resnet8 of width 0.25 on digits, {record["epochs"]} epochs.

* Stopped {stops}; {record["in a save"]} left a save unfinished; every restart went on.
* Final state identical, bit for bit: {state}. Metrics identical but for times: {metrics}.
* Damages of the newest checkpoint, {len(record["damages"])}:

{_results.table(["damage", "end"], record["damages"])}
"""
    return text


def main() -> None:
    parser = _results.make_parser("fault_injection", __doc__)
    parser.add_argument("--stops", type=int, default=80)
    parser.add_argument("--damages", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.render:
        found = inject(arguments.stops, arguments.damages, arguments.epochs, arguments.seed)
        STORE.add(arguments.results, found)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
