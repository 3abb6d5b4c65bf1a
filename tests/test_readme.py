"""What the README says is so: its code runs, its numbers stand in the results files."""

import json
import re
import statistics

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


def test_bfloat16_ratios_are_those_of_the_results():
    lines = map(json.loads, (RESULTS / "memory.jsonl").read_text().splitlines())
    kind = ("resnet50", "bfloat16", "cpu")
    found = {e["variant"]: e for e in lines if (e["net"], e["dtype"], e["machine"]["device"]) == kind}
    ours, plain = found["ours:mimicnorm"], found["batchnorm"]
    temporaries, batch = ours["temp_bytes"] / plain["temp_bytes"], ours["largest_batch"] / plain["largest_batch"]
    assert f"plans {temporaries:.3f} of BatchNorm's temporaries for ResNet-50" in README
    assert f"a {batch:.2f} times larger batch" in README


def test_the_soak_went_as_the_readme_says():
    found = json.loads((RESULTS / "faults.json").read_text())
    signals = f"stopped {found['SIGKILL']} times by SIGKILL and {found['SIGTERM obeyed']} times by SIGTERM"
    assert f"{signals}, {found['in a save']} of them in the midst of a save" in " ".join(README.split())
    assert found["state_identical"]
    assert found["record_identical"]
    assert found["metrics_identical"]
    assert f"and {len(found['damages'])} damages" in README
    assert {end for _, end in found["damages"]} == {"harmless", "detected, the one before it used"}


def test_memory_and_time_table_is_that_of_the_results():
    nets = {
        "ResNet-50": "resnet50",
        "ResNet-18": "resnet18",
        "VGG-16": "vgg16",
        "SqueezeNet": "squeezenet",
        "ShuffleNetV2": "shufflenetv2_x1",
        "MobileNetV2": "mobilenetv2",
    }
    lines = {}
    for file in ("memory", "step_time"):
        for line in map(json.loads, (RESULTS / f"{file}.jsonl").read_text().splitlines()):
            if (line["machine"]["device"], line["dtype"], line["batch"]) == ("cpu", "float32", 64):
                lines[file, line["net"], line["variant"]] = line
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+ \| [\d,]+ \| .*) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == list(nets)
    for name, cells in rows:
        plain, remat, ours = (
            lines["memory", nets[name], variant] for variant in ("batchnorm", "batchnorm_remat", "ours:mimicnorm")
        )
        kept = [line["saved_bytes"] for line in (plain, remat, ours)]
        times = [lines["step_time", nets[name], variant]["seconds"] for variant in ("ours:mimicnorm", "batchnorm")]
        assert cells.split(" | ") == [
            *(f"{value / 2**20:,.0f}" for value in kept[:2]),
            f"{kept[2] / 2**20:,.0f} ({kept[2] / kept[0]:.3f})",
            f"{ours['temp_bytes'] / plain['temp_bytes']:.3f}",
            f"{ours['largest_batch'] / plain['largest_batch']:.2f}",
            f"{statistics.median(a / b for a, b in zip(*times, strict=True)):.3f}",
        ]
