"""Imports point downwards only, wings do not know each other, files stay small, names stay in their place."""

import ast
import importlib
import re
from collections.abc import Iterator
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


def test_tests_import_what_a_package_exports_from_the_package():
    """Nothing private, and nothing from an inner module that its package exports."""
    deep = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for module, name in [(node.module or "", alias.name) for node in nodes for alias in node.names]:
            if not module.startswith(PACKAGE + "."):
                continue
            parts, found = module.split("."), getattr(importlib.import_module(module), name, None)
            packages = [importlib.import_module(".".join(parts[:n])) for n in range(2, len(parts))]
            exported = [getattr(package, name) for package in packages if name in getattr(package, "__all__", ())]
            if name.startswith("_") or any(one is found for one in exported):
                deep.add(f"{path.name}: {module}.{name}")
    assert not deep


def _surfaces() -> dict[str, set[str]]:
    """What users may import from each package: what it exports, and its sub-packages; from the top its modules too."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        name = ".".join(path.parent.relative_to(ROOT).parts)
        inner = {folder.parent.name for folder in path.parent.glob("*/__init__.py")}
        found[name] = {*getattr(importlib.import_module(name), "__all__", ()), *inner}
    found[PACKAGE] |= {"__version__"} | {path.stem for path in (ROOT / PACKAGE).glob("[!_]*.py")}
    return found


def _shown() -> Iterator[tuple[Path, ast.Module]]:
    """Code that users read: benchmarks, configs, tools, notebooks, and the examples of the pages."""
    for folder in ("benchmarks", "configs", "tools", "docs"):
        yield from ((path, ast.parse(path.read_text())) for path in sorted((ROOT / folder).rglob("*.py")))
    yield ROOT / "train.py", ast.parse((ROOT / "train.py").read_text())
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield page, ast.parse(block)


def _reached(code: ast.Module) -> set[str]:
    """Names of ours that are imported, or read as attributes of what is imported: dotted, from the top package on."""
    bound = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    chains = [ast.unparse(node) for node in ast.walk(code) if isinstance(node, ast.Attribute)]
    parts = [chain.split(".") for chain in chains if re.fullmatch(r"[\w.]+", chain)]
    found = {*bound.values(), *(".".join([bound[first], *rest]) for first, *rest in parts if first in bound)}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def test_what_users_read_reaches_only_what_packages_export():
    """Nothing private, and nothing of an inner module, be it by an import or as an attribute."""
    surfaces, deep = _surfaces(), set()
    for path, code in _shown():
        for name in _reached(code):
            parts = name.split(".")
            depth = max(n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in surfaces)
            package, rest = ".".join(parts[:depth]), parts[depth:]
            private = any(part.startswith("_") and part != "__version__" for part in rest)
            if private or (rest and rest[0] not in surfaces[package]):
                deep.add(f"{path.relative_to(ROOT)}: {name}")
    assert not deep, "\n".join(sorted(deep))
