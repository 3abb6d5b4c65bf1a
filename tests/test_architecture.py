"""Imports point downwards only, wings do not know each other, files stay small, names stay in their place."""

import ast
import importlib
from pathlib import Path

import pytest

from mimicnorm_jax.methods import METHODS
from tests.conftest import ROOT

PACKAGE = "mimicnorm_jax"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
FLOORS: tuple[set[str], ...] = (
    {"errors"},
    {"utils"},
    {"distributed"},
    {"functional"},
    {"init_schemes", "initializers", "optim"},
    {"linen", "nnx"},
    {"methods"},
    {"models", "data", "planning", "plots"},
    {"diagnostics", "interop", "search"},
    {"theory"},
    {"training"},
    {"monitoring", "configs"},
    {"__init__", "cli"},
    {"__main__"},
)
"""From the ground up. A module imports from its own package and from the floors below it."""
WITHOUT_FLAX = {
    "errors",
    "utils",
    "distributed",
    "functional",
    "init_schemes",
    "initializers",
    "optim",
    "planning",
    "plots",
    "theory",
}


WIDE = {"nnx/norm.py": {"__init__"}}
"""The functions with more than six arguments: a constructor that takes `nnx.BatchNorm`'s."""


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def _noun(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    floor = next(i for i, names in enumerate(FLOORS) if _noun(path) in names)
    below = {_noun(path)}.union(*FLOORS[:floor])
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith(PACKAGE + ".")}
    assert ours - below == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_stay_in_their_place(path):
    outside = {name.split(".")[0] for name in _imports(path)}
    assert "neural_tangents" not in outside
    assert "tensorflow" not in outside
    assert "matplotlib" not in outside or _noun(path) == "plots"
    assert "flax" not in outside or _noun(path) not in WITHOUT_FLAX
    if path.name == "config.py":
        assert "jax" not in outside


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_networks_know_no_method_by_name(path):
    code = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    defaults = ["mimicnorm"] if path.name == "creation.py" else []
    named = [value for value in code if value in METHODS and value not in defaults]
    assert named == []


@pytest.mark.parametrize("path", [*FILES, ROOT / "train.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path):
    """No pickle, and nothing that evaluates text: checkpoints, configs and data are data."""
    outside = {name.split(".")[0] for name in _imports(path)}
    assert not outside & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {node.func.id for node in calls if isinstance(node.func, ast.Name)} & {"eval", "exec", "compile"}
    assert not any(keyword.arg == "allow_pickle" for node in calls for keyword in node.keywords)


def test_files_and_functions_stay_small():
    """The tests' and the benchmarks' too."""
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = [part for part in node.body if not isinstance(part, ast.Expr)] or node.body
                last = body[-1].end_lineno
                assert last is not None
                assert last - body[0].lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_take_at_most_six_arguments(path):
    wide = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([a for a in every if a.arg not in ("self", "cls")]) > 6:
                wide.add(node.name)
    assert wide == WIDE.get(path.relative_to(ROOT / PACKAGE).as_posix(), set())


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_users_import_what_a_package_exports_from_the_package(folder):
    """Nothing private, and nothing from an inner module that its package exports."""
    deep = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for module, name in [(node.module or "", alias.name) for node in nodes for alias in node.names]:
            if not module.startswith(PACKAGE + "."):
                continue
            parts = module.split(".")
            packages = [importlib.import_module(".".join(parts[:n])) for n in range(2, len(parts))]
            if name.startswith("_") or any(name in getattr(package, "__all__", ()) for package in packages):
                deep.add(f"{path.name}: {module}.{name}")
    assert not deep
