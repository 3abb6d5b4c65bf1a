"""What the reference's reader of docstrings is told about ours."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Takes a section `Example:` for one of doctests, which griffe calls `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section before the docstring is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
