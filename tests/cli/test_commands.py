"""The commands beside each other in one process: each with flags, help and an ending of its own."""

import sys

import pytest
from absl import flags

from mimicnorm_jax import cli
from mimicnorm_jax.cli import plan, train
from mimicnorm_jax.training.config import FIELDS

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.mark.parametrize(("command", "flag"), [(train, "--workdir"), (plan, "--largest_batch")])
@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_is_the_commands_own_docstring_flags_and_every_field(command, flag, asked, capsys):
    name = command.__name__.rpartition(".")[2]
    before = list(sys.argv)
    assert cli.main([name, asked]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(command.__doc__)
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


def test_where_there_is_no_clone_a_config_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.command, "CLONE_CONFIG", tmp_path / "digits.py")
    assert train.main([]) == 2
    assert "--config=FILE[:MODEL[,METHOD]] is needed" in capsys.readouterr().err
