"""What the README says is so: its code runs, its numbers stand in the results files."""

import json
import re
import statistics

import confirm_plan
import memory
from comparison import best

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"__name__": "readme"})


def test_ablation_table_is_that_of_the_results():
    lines = [json.loads(line) for line in (RESULTS / "figure6_small.jsonl").read_text().splitlines()]
    runs = {}
    for line in lines:
        init = line["config"]["init"]
        arm = line["config"]["method"] + (f", {init}" if init != "published" else "")
        runs.setdefault(arm, []).append(line["curve"][-1])
    header, values = re.search(r"\| (batchnorm \| mimicnorm .*) \|\n\|[-|]*\n\| (.*) \|", README).groups()
    for arm, cell in zip(header.split(" | "), values.split(" | "), strict=True):
        final = [100 * row["test_accuracy"] for row in runs[arm]]
        assert len(final) == 3
        assert cell == f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f}"
    text = (RESULTS / "figure6_small_bfloat16.jsonl").read_text()
    half = [100 * json.loads(line)["curve"][-1]["test_accuracy"] for line in text.splitlines()]
    assert f"reaches {statistics.mean(half):.2f} ± {statistics.stdev(half):.2f} (two seeds)" in README
    assert len(half) == 2
    losses = [statistics.mean(row["test_loss"] for row in runs[arm]) for arm in ("batchnorm", "mimicnorm")]
    assert "({:.2f} against {:.2f})".format(*losses) in README


def test_table_by_rate_is_that_of_the_results():
    lines = [json.loads(line) for line in (RESULTS / "table2_small.jsonl").read_text().splitlines()]
    methods = ("none", "weightmean", "mimicnorm", "batchnorm")
    header, body = re.search(r"\| rate \| (.*) \|\n\|[-|]*\n((?:\| .*\n)+)", README).groups()
    assert tuple(header.split(" | ")) == methods
    rows = [row.strip("| ").split(" | ") for row in body.splitlines()]
    assert len(rows) == 7
    for rate, *cells in rows:
        for method, cell in zip(methods, cells, strict=True):
            config = {"learning_rate": float(rate), "method": method}
            found = [best(line) for line in lines if line["config"].items() >= config.items()]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            assert cell == f"{statistics.mean(found):.2f}{spread}"
    diagnostics = json.loads((RESULTS / "appendix_b2_small.jsonl").read_text().splitlines()[0])["diagnostics"]
    assert f"grows from 1 to {diagnostics[-1]['last_bn_variance']:,.0f}," in README
    assert diagnostics[0]["last_bn_variance"] == 1


def test_default_run_is_that_of_the_results():
    runs = json.loads((RESULTS / "default_run.json").read_text())
    final = [100 * run["final_accuracy"] for run in runs]
    seconds = [run["wall_seconds"] for run in runs]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s" in README
    assert f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f} %" in README
    assert f"{max(run['peak_host_bytes'] for run in runs) / 2**30:.1f} GiB" in README


def test_tangent_kernel_table_is_that_of_the_results():
    results = json.loads((RESULTS / "ntk.json").read_text())
    rows = re.findall(r"^\| (\w[^|]*?): [^|]* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) == 8
    for case, ours, theirs, ratio in rows:
        result = results[case]
        seconds = [statistics.median(result[who]["seconds"]) for who in ("ours", "theirs")]
        assert [ours, theirs, ratio] == [f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", f"{seconds[1] / seconds[0]:.2f}"]


def test_regime_table_is_that_of_the_results():
    lines = [json.loads(line) for line in (RESULTS / "regime.jsonl").read_text().splitlines()]
    nets = {"VGG-16": "vgg16", "ResNet-18": "resnet18", "ResNet-50": "resnet50"}
    quantities = {"condition number": "kappa", "growth": "growth"}
    rows = re.findall(r"^\| ([\w-]+), (condition number|growth) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for net, quantity, cells in rows:
        for method, cell in zip(("batchnorm", "mimicnorm", "none", "fixup"), cells.split(" | "), strict=True):
            found = [
                line[quantities[quantity]] for line in lines if (line["net"], line["method"]) == (nets[net], method)
            ]
            spread = f"{statistics.mean(found):.3g} ± {statistics.stdev(found):.2g}" if found else ""
            assert cell.strip() == spread


def test_verify_passed_where_the_readme_says_so():
    report = json.loads((RESULTS / "verify" / "verify.json").read_text())
    seeds = [name for name in report if name.startswith("seed ")]
    assert seeds == ["seed 0", "seed 1", "seed 2"]
    assert all(row["passed"] for seed in seeds for row in report[seed])


def test_the_soak_went_as_the_readme_says():
    found = json.loads((RESULTS / "faults.json").read_text())
    signals = f"stopped {found['SIGKILL']} times by SIGKILL and {found['SIGTERM obeyed']} times by SIGTERM"
    assert f"{signals}, {found['in a save']} of them in the midst of a save" in " ".join(README.split())
    assert found["state_identical"]
    assert found["record_identical"]
    assert found["metrics_identical"]
    assert f"and {len(found['damages'])} damages" in README
    assert {end for _, end in found["damages"]} == {"harmless", "detected, the one before it used"}


NETS = {
    "ResNet-50, 224 x 224": "resnet50_imagenet",
    "ResNet-50": "resnet50",
    "ResNet-18": "resnet18",
    "VGG-16": "vgg16",
    "SqueezeNet": "squeezenet",
    "ShuffleNetV2": "shufflenetv2_x1",
    "MobileNetV2": "mobilenetv2",
}


def _cells(header):
    """The cells of the table whose header starts so, by row."""
    table = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_planned_memory_is_that_of_the_results():
    lines = {(e["target"], e["net"], e["variant"]): e for e in memory.read().values() if e["dtype"] == "bfloat16"}
    rows = _cells("| network | BatchNorm | recomputing |")
    assert [row[0] for row in rows] == list(NETS)
    for name, *cells in rows:

        def planned(variant, target="h100", name=name):
            return lines.get((target, NETS[name], variant), {}).get("temporary_bytes")

        def ratio(variant, target="h100", planned=planned):
            both = planned(variant, target), planned("batchnorm", target)
            return f"{both[0] / both[1]:.3f}" if all(both) else None

        plain, ours = (lines["h100", NETS[name], variant] for variant in ("batchnorm", "ours:mimicnorm"))
        assert cells == [
            f"{planned('batchnorm') / 2**20:,.0f}",
            ratio("batchnorm_remat"),
            f"{planned('ours:mimicnorm') / 2**20:,.0f} ({ratio('ours:mimicnorm')})",
            ratio("ours:mimicnorm+cheap") or "-",
            ratio("ours:mimicnorm+stage") or "-",
            f"{memory.traffic(ours) / memory.traffic(plain):.3f}",
            ratio("ours:mimicnorm", "v5e") or "not run",
        ]


def test_what_a_device_did_is_that_of_the_results():
    lines = {(e["net"], e["variant"]): e for e in confirm_plan.read(RESULTS / "confirm_plan.jsonl").values()}
    labels = {
        "BatchNorm": "batchnorm",
        "BatchNorm, recomputing": "batchnorm_remat",
        "MimicNorm": "ours:mimicnorm",
        "MimicNorm, `cheap`": "ours:mimicnorm+cheap",
        "MimicNorm, `stage`": "ours:mimicnorm+stage",
    }
    for name, label, planned, used, seconds in _cells("| network | step | peak planned, MiB |"):
        line, plain = lines[NETS[name], labels[label]], lines[NETS[name], "batchnorm"]
        peaks = [e["peak_device_bytes"] for e in (line, plain)]
        times = [statistics.median(e["seconds"]) for e in (line, plain)]
        assert planned == f"{line['planned_peak_bytes'] / 2**20:,.0f}"
        assert used == f"{peaks[0] / 2**20:,.0f} ({peaks[0] / peaks[1]:.3f})"
        assert seconds == f"{1e3 * times[0]:.2f} ({times[0] / times[1]:.3f})"
        if (name, label) == ("ResNet-50, 224 x 224", "MimicNorm"):
            assert (
                f"{peaks[0] / peaks[1]:.3f} of BatchNorm's memory and {times[0] / times[1]:.3f} of its time" in README
            )
