"""Plans that were made before, on disk."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from mimicnorm_jax.errors import PlanError
from mimicnorm_jax.planning.plans import FORMAT, Plan


def default_folder() -> Path:
    """`mimicnorm_jax/plans` in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimicnorm_jax" / "plans"


class Cache:
    """A folder of plans, one small file each, that may be deleted at any time.

    Args:
      folder: made when the first plan is put there; default: `mimicnorm_jax/plans` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder

    def key(self, program: str, *about: str) -> str:
        """A name for a program under a compiler.

        Args:
          program: its text with the names that JAX gave operations. Files and lines, which change with every edit of
            a source, make no difference.
          *about: target and versions.
        """
        text = re.sub(r'"[^"\n]*"\(?:?\d+:\d+.*$|#loc\d+ = loc\("[^"\n]*":.*$', "", program, flags=re.MULTILINE)
        return hashlib.sha256("\n".join((str(FORMAT), *about, text)).encode()).hexdigest()

    def get(self, key: str) -> Plan | None:
        """The plan of that name; None if there is none or it cannot be read."""
        try:
            return Plan.from_json((self.folder / f"{key}.json").read_text())
        except (OSError, PlanError):
            return None

    def put(self, key: str, plan: Plan) -> None:
        """Keeps a plan, in one step. A folder that cannot be written costs the cache, not the plan.

        Args:
          key: under which it is looked for.
          plan: to keep.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(suffix=".partial", dir=self.folder) as own:
                partial = Path(own) / "plan.json"
                partial.write_text(plan.to_json())
                os.replace(partial, self.folder / f"{key}.json")
        except OSError:
            return
