"""The command as a user calls it."""

import os
import subprocess
import sys

import pytest

from mimicnorm_jax.cli.train import main
from tests.conftest import ROOT

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def _call(*arguments, cwd=ROOT):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    cache["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment = os.environ | cache | {"JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": "/nowhere"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batchsize=3"], "unknown config field 'batchsize': did you mean batch_size"),
        (["--config=configs/cifar100.py:resnt18"], "cifar100 is not prepared under /nowhere"),
        (["--workdri=x"], "'workdri'. Did you mean: workdir"),
        (["--config.batch_size=many"], "--config.batch_size=many"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config.model=resnt8"], "did you mean resnet8"),
        (["--eval_only"], "--eval_only needs --workdir"),
        (["--config=configs/imagenet.py", "--config.model=resnet18"], "which has model='resnet18_imagenet'; or give"),
        (
            ["--config=configs/cifar100.py:reactnet18", "--config.method=bnn_nobn"],
            "--config=configs/cifar100.py:reactnet18,bnn_nobn, which has adaptive_clip=0.02; or give those fields",
        ),
        (
            ["--config=configs/cifar100.py:reactnet18", "--config.method=bnn_nobn", "--config.adaptive_clip=0.02"],
            "cifar100 is not prepared under /nowhere",
        ),
        (["resnet18"], "do not know what to do with 'resnet18'"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("def get_config(): return {'epochs': 3}", "", "returns a dict: have it return mimicnorm_jax.training.base("),
        ("def get_config(): return None", ":resnet8", "takes no argument, and what follows the colon"),
        ("epochs = 3", "", "has no function get_config"),
    ],
)
def test_a_config_file_that_gives_no_config_is_one_paragraph(content, suffix, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # another file's get_config would stay
    (tmp_path / "own.py").write_text(content)
    assert main([f"--config={tmp_path / 'own.py'}{suffix}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


SMALL = ("--config.epochs=1", "--config.width_multiplier=0.25")
RUN = "runs/digits-resnet8-mimicnorm-seed0"
# Orbax leaves coroutines behind where it reads.
reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@reads
@pytest.mark.usefixtures("one_block")
def test_train_then_eval_only_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(SMALL)) == 0
    assert "best test accuracy" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--eval_only", f"--workdir={tmp_path / RUN}"]) == 0
    assert "best checkpoint" in capsys.readouterr().out
    assert main(["--eval_only", f"--workdir={tmp_path / RUN}", *SMALL]) == 0
    assert main(["--eval_only", f"--workdir={tmp_path / RUN}", "--config.dataset=cifar10"]) == 2
    assert "config.dataset is 'cifar10' here and 'digits' in the run" in capsys.readouterr().err
    assert main(["--eval_only", f"--workdir={tmp_path / RUN}", "--noconfig.sync_bn"]) == 2
    assert "config.sync_bn is False here and True in the run" in capsys.readouterr().err


@reads
@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
def test_a_loss_that_is_not_finite_is_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--config.learning_rate=1e30", "--workdir=bad"]) == 3
    assert "not finite at step" in capsys.readouterr().err


@reads
@pytest.mark.slow
def test_in_a_process_of_its_own_it_says_nothing_on_stderr(tmp_path):
    assert _call(*SMALL, cwd=tmp_path).returncode == 0
    result = _call("--eval_only", f"--workdir={tmp_path / RUN}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "best checkpoint" in result.stdout
