"""What the pages show runs: every Python block of the README and of docs/, and the examples of CONTRIBUTING.md."""

import importlib
import re
import sys

import pytest

from mimicnorm_jax import METHODS, data, models
from tests.conftest import ROOT, also

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {"diagnostics.md", "nnx.md"}
"""Left to the slow tier."""


def _blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.usefixtures("one_block")  # what a page shows does not depend on the depth of its network
@pytest.mark.parametrize(
    "page",
    [also(page) if page.name in LONG else page for page in PAGES if _blocks(page)],
    ids=lambda page: page.name,
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in _blocks(page):
        exec(block, names)  # a page's blocks go on from one another


@pytest.fixture
def registries():
    """Method, network and data set by name, left as they were."""
    known = [(table, dict(table)) for table in (METHODS, models.ARCHITECTURES, data.DATASETS)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("registries")
def test_the_examples_of_extending_the_library_train_together(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    modules = ("transform", "method", "network", "dataset")
    for name, block in zip(modules, _blocks(ROOT / "CONTRIBUTING.md"), strict=True):
        assert len(block.splitlines()) <= 40
        (tmp_path / "mine" / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    *_, last = (importlib.import_module(f"mine.{name}") for name in modules)
    assert last.summary["final_accuracy"] > 0.9
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
