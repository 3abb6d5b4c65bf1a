"""The errors that a user can mend, which `train.py` prints as one paragraph instead of a traceback."""


class UserError(Exception):
    """Something that the user gave is wrong; the message names it, its value and the way out."""


class ConfigError(UserError):
    """A field of the config is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(UserError):
    """A dataset is unknown, missing or damaged."""


class WorkdirError(UserError):
    """A work directory cannot be used: unwritable, another run's, or with a damaged checkpoint."""


class NonFiniteLossError(UserError):
    """The loss became infinite or not a number."""
