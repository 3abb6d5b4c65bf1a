"""The errors that a user can mend, which `train.py` prints as one paragraph instead of a traceback."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """Something that the user gave is wrong; the message names it, its value and the way out."""


class ConfigError(UserError):
    """A field of the config is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(UserError):
    """A dataset is unknown, missing or damaged."""


class WorkdirError(UserError):
    """A work directory cannot be used: unwritable, another run's, or with a damaged checkpoint."""


class DamagedCheckpointError(WorkdirError):
    """A checkpoint cannot be read, or its contents are not those that were saved."""


class StateDictError(UserError):
    """A PyTorch state dict cannot be read, or does not belong to the network.

    Attributes:
      missing, unexpected: names of arrays.
      misshapen: names of arrays with both shapes.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)


class FoldError(UserError):
    """A network cannot be folded; the message names what stands in the way."""


class ExportError(UserError):
    """A network cannot be exported: the format, its package, the image size or the path stands in the way."""


class PlanError(UserError):
    """A plan cannot be made: the target, its plugin, or the function stands in the way."""


class DoesNotFitError(PlanError):
    """A program needs more memory than its target has.

    Attributes:
      needed, available: bytes of one device; None where the compiler does not say.
    """

    def __init__(self, message: str, needed: int | None, available: int | None) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


class PeerError(UserError):
    """Another process of the same run ended or cannot be reached."""


class NonFiniteLossError(UserError):
    """The loss or its gradient became infinite or not a number.

    Attributes:
      where: `step`, `epoch` and `learning_rate`; `norms` of the state's leaves, by path.
    """

    def __init__(self, message: str, where: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.where = dict(where)


def unknown(what: str, value: object, choices: Iterable[str]) -> str:
    """The sentence for a name that is not one of `choices`, with the near misses.

    Args:
      what: the name is of.
      value: the name.
      choices: those that there are.

    Example:
      >>> unknown("fruit", "aple", ["apple", "pear"])
      "unknown fruit 'aple': did you mean apple? It is one of apple, pear"
    """
    names = list(choices)
    near = difflib.get_close_matches(str(value), names)
    hint = f"did you mean {' or '.join(near)}? It" if near else "it"
    return f"unknown {what} {value!r}: {hint} is one of {', '.join(names)}"
