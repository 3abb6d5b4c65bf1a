"""The README's code runs."""

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"__name__": "readme"})
