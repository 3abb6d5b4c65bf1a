"""What `train` and `plan` share: flags of their own with a config among them, help, and how a command ends."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from mimicnorm_jax import distributed
from mimicnorm_jax.errors import ConfigError, NonFiniteLossError, PeerError, UserError, unknown
from mimicnorm_jax.training import config as config_lib

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The package's config files, which `--config=configs/NAME.py` names from everywhere."""
NAMES = tuple(f"configs/{path.name}" for path in sorted(CONFIGS.glob("[!_]*.py")))
DEFAULT_CONFIG = "configs/digits.py"
"""What is trained where no config is named."""
EXIT_CODES: dict[type[UserError], int] = {NonFiniteLossError: 3, PeerError: 4}
"""Of errors that are not bad input."""


def parse(
    define: Callable[[flags.FlagValues], None], document: str, argv: Sequence[str], default: str | None
) -> flags.FlagValues | None:
    """Parses a command's arguments into flags that are its alone.

    Args:
      define: defines the command's flags besides --config.
      document: the command's docstring, the beginning of its help.
      argv: what follows the command.
      default: config file where none is named.

    Returns:
      The flags, with the ConfigDict as `config`; None if help was asked for, and printed.

    Raises:
      UserError: names the argument.
    """
    arguments = [re.sub(r"^--?[a-z\-]+(?==|$)", lambda m: "--" + m[0].lstrip("-").replace("-", "_"), a) for a in argv]
    if not any(re.match(r"--?config(=|$)", argument) for argument in arguments) and default is not None:
        arguments = [f"--config={default}", *arguments]
    arguments = [re.sub(r"^(--?config=)?(configs/\w+\.py)(?=:|$)", _packaged, argument) for argument in arguments]
    values = _flags(define, arguments, default)
    if any(argument in ("--help", "--h", "-h") for argument in arguments):
        print(f"{document}\n\n{values.main_module_help() or values.get_help()}\n\n{_fields()}")
        return None
    _read(values, arguments)
    _require_recipe(values, define, arguments)
    return values


def _flags(define: Callable[[flags.FlagValues], None], arguments: list[str], default: str | None) -> flags.FlagValues:
    values = flags.FlagValues()
    said = (
        "FILE[:MODEL[,METHOD]], your own or the package's "
        + ", ".join(NAMES)
        + (f"; default: {default}." if default else ".")
    )
    config_flags.DEFINE_config_file("config", None, said, flag_values=values, sys_argv=arguments)
    define(values)
    return values


def _require_recipe(
    values: flags.FlagValues, define: Callable[[flags.FlagValues], None], arguments: Sequence[str]
) -> None:
    """Raises ConfigError for a model or method that would have another recipe behind the colon of a package's file."""
    named = [field for field in ("model", "method") if field in given_fields(arguments)]
    files = [match for match in (re.match(r"--?config=([^:]*)", argument) for argument in arguments) if match]
    if not named or len(files) != 1 or Path(files[0][1]).resolve().parent != CONFIGS.resolve():
        return
    config: Any = values["config"].value
    file, chosen = files[0][1], f"{config.model},{config.method}"
    overrides = [one for one in arguments if (found := given_fields([one])) and found[0] not in named]
    behind = [f"--config={file}:{chosen}", *overrides]
    recipe = _flags(define, behind, None)
    _read(recipe, behind)
    meant: Any = recipe["config"].value
    if differing := [f"{name}={meant[name]!r}" for name in config_lib.FIELDS if meant[name] != config[name]]:
        raise ConfigError(
            f"--config.{named[0]}={config[named[0]]} leaves the recipe of configs/{Path(file).name} as it is for "
            f"another: give it behind the colon, as --config=configs/{Path(file).name}:{chosen}, which has "
            f"{', '.join(differing)}; or give those fields too"
        )


def _packaged(match: re.Match[str]) -> str:
    """The package's file of this name, where the current folder has none."""
    packaged = CONFIGS / Path(match[2]).name
    taken = match[2] if Path(match[2]).exists() or not packaged.exists() else packaged
    return f"{match[1] or ''}{taken}"


def _fields() -> str:
    return f"Fields of the config, with their defaults before the config file's:\n{config_lib.describe()}"


def given_fields(argv: Sequence[str]) -> list[str]:
    """The fields of the config that arguments name, in their order."""
    return [match[1] for match in map(re.compile(r"--?(?:no)?config\.(\w+)").match, argv) if match]


def _read(values: flags.FlagValues, arguments: list[str]) -> None:
    for field in given_fields(arguments):
        if field not in config_lib.FIELDS:
            raise ConfigError(unknown("config field", field, config_lib.FIELDS))
    try:
        _, *rest = values(["mimicnorm", *arguments])
        config = values["config"].value
        if config is None:
            raise UserError("--config=FILE[:MODEL[,METHOD]] is needed (see --help)")
        if isinstance(config, Mapping):
            raise ConfigError(
                f"get_config of the config file returns a {type(config).__name__}: have it return "
                "mimicnorm_jax.training.base(FIELD=VALUE, ...)"
            )
        config.to_dict()  # a file that could not be loaded says so when it is first used
    except flags.Error as error:
        if "get_config() takes 0 positional arguments" in str(error):
            raise ConfigError(
                "get_config of the config file takes no argument, and what follows the colon in --config=FILE:MODEL is "
                "one: leave it out, or have get_config take it as the package's own do"
            ) from error
        raise UserError(f"{error} (see --help)") from error
    except AttributeError as error:
        if error.name != "get_config":
            raise
        raise ConfigError("the config file has no function get_config, which returns the config") from error
    except OSError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if rest:
        raise UserError(f"do not know what to do with {' '.join(rest)!r}. See --help")


def make_folder(folder: Path) -> None:
    """Makes the folder of --out, before what it is for is computed.

    Raises:
      UserError: if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        raise UserError(f"cannot write to --out={folder}: {error}. Name another folder") from error


def run(command: Callable[[], int], interrupted: str) -> int:
    """Runs a command, and says in one paragraph what a user can mend.

    Args:
      command: returns the exit code.
      interrupted: what is said after Ctrl-C.

    Returns:
      The exit code: the command's, 2 for bad input or as `EXIT_CODES` says, 130 after Ctrl-C.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file
    try:
        return command()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_CODES.get(type(error), 2)
        if distributed.is_connected():
            # Leaving as usual would wait minutes for processes that are gone, or that wait for this one.
            os._exit(code)
        return code
