"""`python -m mimicnorm_jax plan`, as a user runs it."""

import json
import os
import re
import subprocess
import sys

import pytest

from mimicnorm_jax.cli.plan import main
from tests.conftest import ROOT, in_processes
from tests.planning.programs import needs_cuda

CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}:resnet8,mimicnorm"
SMALL = (CONFIG, "--config.width_multiplier=0.5", "--config.batch_size=16", "--target=cpu")


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mimicnorm_jax", "plan", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@in_processes
@pytest.mark.slow
def test_a_table_json_and_figures_then_the_same_from_the_cache(tmp_path):
    out = tmp_path / "out"
    arguments = (*SMALL, "--compare=batchnorm,mimicnorm", f"--out={out}", f"--cache={tmp_path / 'cache'}")
    first = _run(*arguments)
    assert (first.returncode, "error" in first.stderr) == (0, False), first.stderr
    lines = first.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("target"))
    assert [line.split()[:2] for line in lines[head + 1 : head + 3]] == [["cpu", "batchnorm"], ["cpu", "mimicnorm"]]
    content = json.loads((out / "plan.json").read_text())
    assert [row["run"] for row in content["rows"]] == ["batchnorm", "mimicnorm"]
    assert all(row["step"]["flops"] > row["evaluation"]["flops"] > 0 for row in content["rows"])
    assert content["config"]["width_multiplier"] == 0.5
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(before) == 4  # a training and an evaluation step each
    second = _run(*arguments)
    assert second.stdout == first.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target=h10",), "unknown target 'h10': did you mean h100"),
        (("--compare=batchnrm",), "unknown method in --compare 'batchnrm': did you mean batchnorm"),
        (("--config.batchsize=3",), "unknown config field 'batchsize': did you mean batch_size"),
        (("--target-config=/nowhere", "--target=h100"), "cannot read the target config /nowhere"),
        (("--frontier", "--compare=none"), "leave out --compare"),
        (("--target=cpu", "--largest_batch"), "--largest_batch and --target=cpu: its memory has no bound to fit"),
        (("--out=/dev/null/here",), "cannot write to --out=/dev/null/here"),
    ],
)
# How ml_collections loads a config file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_bad_input_ends_with_a_sentence(arguments, message, capsys):
    assert main([CONFIG, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1


@needs_cuda
@pytest.mark.slow
def test_a_streamed_run_is_planned_without_data_and_says_how_many_cores_would_keep_it_busy():
    """As many as decode a batch in the least time that its step can take; ImageNet's form of the network is meant."""
    small = ("--config.width_multiplier=0.125", "--config.batch_size=16", "--config.image_size=64")
    done = _run("--config=configs/imagenet.py:resnet18", *small, "--target=h100", "--config.data_dir=/nowhere")
    assert done.returncode == 0, done.stderr
    assert "resnet18_imagenet, batch 16, bfloat16, imagenet2012" in done.stdout
    rate = float(re.search(r"decodes ([\d,]+) a second", done.stdout)[1].replace(",", ""))
    line = re.search(r"h100 .*: at most ([\d,]+) images/s, which ([\d,.]+) such cores decode", done.stdout)
    images, cores = (float(number.replace(",", "")) for number in line.groups())
    assert rate > 0
    assert cores == pytest.approx(images / rate, rel=0.01, abs=0.06)  # as printed
