"""The commands beside each other in one process: each with flags, help and an ending of its own."""

import sys

import pytest
from absl import flags

from mimicnorm_jax import cli
from mimicnorm_jax.cli import command, plan, train
from mimicnorm_jax.training.config import FIELDS

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.mark.parametrize(("module", "flag"), [(train, "--workdir"), (plan, "--largest_batch")])
@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_is_the_commands_own_docstring_flags_and_every_field(module, flag, asked, capsys):
    name = module.__name__.rpartition(".")[2]
    before = list(sys.argv)
    assert cli.main([name, asked]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(module.__doc__)
    assert flag.lstrip("-") in shown
    assert all(f"--config.{field}=" in shown for field in FIELDS)
    assert sys.argv == before
    assert not {"workdir", "largest_batch", "config"} & set(flags.FLAGS)


def test_a_command_that_there_is_not_is_named_with_those_there_are(capsys):
    assert cli.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'trian'" in said
    assert all(name in said for name in cli.COMMANDS)
    assert cli.main([]) == 0


def test_ctrl_c_ends_with_130_and_a_sentence(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.config_lib, "validate", interrupted)
    assert train.main([]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_config_of_the_current_folder_goes_before_the_packages(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def dataset(*arguments):
        values = command.parse(lambda values: None, "", arguments, command.DEFAULT_CONFIG)
        return values.config.dataset, values.config.model

    assert dataset() == ("digits", "resnet8")
    assert dataset("--config=configs/cifar100.py:vgg11") == ("cifar100", "vgg11")
    assert dataset("--config", "configs/imagenet.py") == ("imagenet2012", "resnet50_imagenet")
    (tmp_path / "configs").mkdir()
    packaged = (command.CONFIGS / "cifar100.py").read_text()
    (tmp_path / "configs" / "cifar100.py").write_text(packaged.replace('"cifar100"', '"cifar10"'))
    assert dataset("--config=configs/cifar100.py") == ("cifar10", "resnet18")


def test_without_arguments_every_command_is_shown_with_an_example_that_fits_80_columns(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in cli.COMMANDS:
        assert any(line.strip().startswith(f"mimicnorm {name}") for line in lines)
