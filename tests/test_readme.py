"""What the README says is so: its code runs, its numbers stand in the results files."""

import json
import re
import statistics

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"__name__": "readme"})


def test_ablation_table_is_that_of_the_results():
    lines = [json.loads(line) for line in (RESULTS / "ablation_small.jsonl").read_text().splitlines()]
    header, values = re.search(r"\| (batchnorm \| mimicnorm .*) \|\n\|[-|]*\n\| (.*) \|", README).groups()
    for arm, cell in zip(header.split(" | "), values.split(" | "), strict=True):
        final = [100 * line["curve"][-1]["test_accuracy"] for line in lines if line["arm"] == arm]
        assert len(final) == 3
        assert cell == f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f}"
    losses = [
        statistics.mean(line["curve"][-1]["test_loss"] for line in lines if line["arm"] == arm)
        for arm in ("batchnorm", "mimicnorm")
    ]
    assert "({:.2f} against {:.2f})".format(*losses) in README


def test_default_run_is_that_of_the_results():
    runs = json.loads((RESULTS / "default_run.json").read_text())
    final = [100 * run["final_accuracy"] for run in runs]
    seconds = [run["wall_seconds"] for run in runs]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s" in README
    assert f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f} %" in README
    assert f"{max(run['peak_host_bytes'] for run in runs) / 2**30:.1f} GiB" in README
