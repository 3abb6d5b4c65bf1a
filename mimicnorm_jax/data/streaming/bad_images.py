"""Images that cannot be used: skipped and counted, up to a bound."""

import threading

from mimicnorm_jax.errors import DataError
from mimicnorm_jax.utils.console import log_line


class BadImages:
    """The images that a run has skipped, by name, with the reason; for use from many threads.

    Args:
      bound: how many a run may have; one more stops it.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def found(self) -> dict[str, str]:
        """Reasons by name, sorted."""
        with self._lock:
            return dict(sorted(self._found.items()))

    def add(self, name: str, reason: str) -> None:
        """Counts an image, once however often it is met.

        Args:
          name: of the image.
          reason: why it cannot be used.

        Raises:
          DataError: if that is more than the bound allows.
        """
        with self._lock:
            if name in self._found:
                return
            self._found[name] = reason
            count = len(self._found)
        if count > self._bound:
            raise DataError(
                f"{name} cannot be used: {reason}. That is {count} bad image{'s' * (count > 1)}, and "
                f"config.max_bad_images is {self._bound}: mend or remove the file, or allow more with "
                f"--config.max_bad_images={max(10, 2 * count)} to have them skipped and named in the summary"
            )
        log_line(f"skipped {name}: {reason}")
