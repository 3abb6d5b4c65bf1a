"""The store of records: what is resumed, what is replaced, in which order, and what is refused."""

import importlib
import json
import re
import subprocess
import sys

import pytest

import benchmarks
from benchmarks import confirm_plan, largest_batch, render, step_memory
from benchmarks._results import RESULTS, ROOT, Store, mean_and_deviation

STORE = Store("example", lambda record: (record["net"], record["seed"]))


def test_a_record_takes_the_place_of_the_one_with_its_key_and_no_other(tmp_path):
    STORE.add(tmp_path, {"net": "a", "seed": 0, "x": 1.25}, {"net": "a", "seed": 1, "x": 2})
    STORE.add(tmp_path, {"net": "a", "seed": 0, "x": 3})
    assert list(STORE.read(tmp_path).values()) == [{"net": "a", "seed": 0, "x": 3}, {"net": "a", "seed": 1, "x": 2}]


def test_what_another_process_added_meanwhile_is_kept(tmp_path):
    before = STORE.read(tmp_path)
    with (tmp_path / "example.jsonl").open("a") as file:
        file.write('{"net": "b", "seed": 0}\n')
    STORE.add(tmp_path, {"net": "a", "seed": 0})
    assert before == {}
    assert set(STORE.read(tmp_path)) == {("b", 0), ("a", 0)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"net": "a", "se', "JSONDecodeError"), ('{"net": "a"}', "KeyError.*seed"), ("[1, 2]", "TypeError")],
)
def test_a_line_that_is_no_record_is_named_with_its_number(text, reason, tmp_path):
    (tmp_path / "example.jsonl").write_text(f'{{"net": "a", "seed": 0}}\n{text}\n')
    with pytest.raises(ValueError, match=rf"example\.jsonl:2 is no record of example: {reason}"):
        STORE.read(tmp_path)


@pytest.mark.parametrize("store", [module.STORE for module in render.BENCHMARKS], ids=lambda store: store.name)
def test_committed_records_have_keys_of_their_own_and_are_written_as_they_stand(store, tmp_path):
    path = RESULTS / f"{store.name}.jsonl"
    if not path.exists():
        pytest.skip("not run yet")
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(store.read(RESULTS)) == len(records)
    assert json.loads(path.read_text().splitlines()[0], parse_constant=pytest.fail)  # JSON has no NaN
    store.add(tmp_path, *records)
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_plans_come_in_one_order_however_they_were_added(tmp_path):
    text = (RESULTS / "step_memory.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    pages = set()
    for i, order in enumerate((records[::2] + records[1::2], records[len(records) // 2 :] + records)):
        (tmp_path / f"{i}").mkdir()
        # As a file to which another checkout appended: records anywhere, some of them twice.
        (tmp_path / f"{i}" / "step_memory.jsonl").write_text("".join(json.dumps(r) + "\n" for r in order))
        step_memory.STORE.write_page(tmp_path / f"{i}", step_memory.page)
        pages.add((tmp_path / f"{i}" / "step_memory.md").read_text())
        written = (tmp_path / f"{i}" / "step_memory.jsonl").read_text().splitlines()
        assert sorted(written) == sorted(text.splitlines())
    assert pages == {(RESULTS / "step_memory.md").read_text()}


def test_what_the_committed_records_hold_is_not_measured_again(tmp_path, monkeypatch, capsys):
    """Every case of one compiler's records, asked for again with them in place, starts no process."""
    records = [r for r in step_memory.STORE.read(RESULTS).values() if r["target"] == "h100"]
    (version,) = {r["versions"]["jax"] for r in records}
    step_memory.STORE.add(tmp_path, *records)
    asked = {name: sorted({r[name] for r in records}) for name in ("net", "variant", "dtype")}
    flags = [part for name, values in asked.items() for part in (f"--{name}s", *values)]
    monkeypatch.setattr(step_memory.jax, "__version__", version)
    monkeypatch.setattr(sys, "argv", ["step_memory", "--targets", "h100", *flags, f"--results={tmp_path}"])
    measured = []
    monkeypatch.setattr(step_memory._process, "measure", lambda *case, **variables: measured.append(case) or 1)
    step_memory.main()
    held = {(r["net"], r["variant"], r["dtype"]) for r in records}
    assert not held & {case[1:4] for case in measured}
    monkeypatch.setattr(step_memory.jax, "__version__", "0.0")
    measured.clear()
    step_memory.main()
    assert held <= {case[1:4] for case in measured}
    assert "failed: " in capsys.readouterr().out


def test_a_phase_that_fails_on_a_device_is_a_record_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(confirm_plan._process, "measure", lambda *case, **variables: 137)
    record = confirm_plan._measure("resnet8", "batchnorm", "float32", 2)
    confirm_plan.STORE.add(tmp_path, record)
    page = confirm_plan.page(list(confirm_plan.STORE.read(tmp_path).values()))
    assert "| resnet8 | batchnorm | - | - | failed (compile, code 137) | - | - |" in page


def test_ratios_are_between_plans_of_one_compiler(tmp_path):
    """A batch under one version of jax is never divided by BatchNorm's under another."""
    about = {"target": "h100", "dtype": "bfloat16", "net": "resnet50_imagenet", "peak_bytes": 1, "usable_bytes": 1}
    for jax_version, variant, batch in (
        ("1", "batchnorm", 100),
        ("1", "ours:mimicnorm", 200),
        ("2", "ours:mimicnorm", 300),
    ):
        record = about | {"variant": variant, "batch": batch, "versions": {"jax": jax_version}}
        largest_batch.STORE.add(tmp_path, record)
    table = render.TABLES["largest_batch"](tmp_path)
    cells = [[cell.strip() for cell in row.split("|")[4:6]] for row in table.splitlines()[2:]]
    assert cells == [["100", "1.00"], ["200", "2.00"], ["300", "-"]]


@pytest.mark.parametrize(
    "module",
    [
        "quickstart", "step_memory", "largest_batch", "confirm_plan", "step_time", "profile_step", "input_pipeline",
        "fault_injection", "trainability", "ntk.compare", "ntk.digits", "ntk.families", "paper.reproduce", "render",
    ],
)  # fmt: skip
def test_every_command_is_named_in_its_help_and_in_the_packages_docstring(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{module}").main()
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{module} ")
    assert re.search(rf"^{module}: ", benchmarks.__doc__, re.MULTILINE)


def test_the_networks_of_the_tangent_kernel_need_nothing_of_this_library():
    """So that the process runs in an environment that has another library instead."""
    code = "import sys; import benchmarks.ntk.cases; sys.exit('mimicnorm_jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("values", "text"), [((), ""), ((2.0,), "2.00"), ((1.0, 3.0), "2.00 ± 1.41")])
def test_a_spread_needs_two_values(values, text):
    assert mean_and_deviation(values) == text
