"""Files that are never half-written."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: readers see the old file or the whole new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")
