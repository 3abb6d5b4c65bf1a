"""The reference is complete: every public name stands on one of its pages, with a docstring."""

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import textwrap
import tomllib
import types

import mimicnorm_jax
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
DOCUMENTED = [path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
WITHOUT_A_USER = ("mimicnorm_jax.__main__", "mimicnorm_jax.cli", "mimicnorm_jax.configs")


def _modules():
    found = [name for _, name, _ in pkgutil.walk_packages(mimicnorm_jax.__path__, "mimicnorm_jax.")]
    return [importlib.import_module(name) for name in found if not name.startswith(WITHOUT_A_USER)]


def _resolve(path):
    """The object of a dotted path."""
    module, names = path, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    for name in names:
        found = getattr(found, name)
    return found


def _names(module):
    """Public names of a module: those it exports, or else defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [name for name in defined if not name.startswith("_")])


def _shown():
    """Objects that stand in the reference."""
    for path in DOCUMENTED:
        found = _resolve(path)
        yield found
        if isinstance(found, types.ModuleType):
            yield from (getattr(found, name) for name in _names(found))


PUBLIC = [(mimicnorm_jax, name) for name in mimicnorm_jax.__all__]
PUBLIC += [(module, name) for module in _modules() for name in getattr(module, "__all__", ())]
PUBLIC += [(found, None) for found in map(_resolve, DOCUMENTED) if isinstance(found, types.ModuleType)]


def test_every_public_name_stands_in_the_reference():
    shown = list(_shown())
    missing = []
    for module, name in PUBLIC:
        found = module if name is None else getattr(module, name)
        if isinstance(found, types.ModuleType):  # a page shows no module within another
            missing += [] if found.__name__ in DOCUMENTED else [found.__name__]
        elif not any(found is one for one in shown):
            missing.append(f"{module.__name__}.{name}")
    assert missing == [], "give each a line `::: NAME` on a page of docs/reference"


def _constants():
    """Names of module level that have a string behind their assignment, by module."""
    found = set()
    for path in (ROOT / "mimicnorm_jax").rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for before, after in itertools.pairwise(body):
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                continue
            targets = before.targets if isinstance(before, ast.Assign) else [getattr(before, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_public_name_has_a_docstring():
    constants = _constants()
    missing = []
    for module, name in PUBLIC:
        found = inspect.unwrap(module if name is None else getattr(module, name))
        where = module.__name__ if name is None else f"{module.__name__}.{name}"
        if name in constants:
            continue
        if isinstance(found, types.ModuleType) or inspect.isclass(found) or inspect.isfunction(found):
            missing += [] if inspect.getdoc(found) else [where]
            # dataclasses and Flax make up a docstring from the signature
            missing += [where] if inspect.isclass(found) and (found.__doc__ or "").startswith(f"{name}(") else []
        else:
            missing.append(where)
        if inspect.isclass(found):
            fields = inspect.get_annotations(found)  # of a dataclass; what they hold is no method
            own = [(n, v) for n, v in vars(found).items() if not n.startswith("_") and n not in fields]
            methods = [n for n, v in own if inspect.isfunction(v) or isinstance(v, (property, classmethod))]
            missing += [f"{where}.{n}" for n in methods if n != "setup" and not inspect.getdoc(getattr(found, n))]
    assert missing == [], "\n".join(missing)


def _functions(module, name):
    """A public function, or the public methods of a public class, that are ours."""
    found = getattr(module, name) if name else module
    if inspect.isfunction(found):
        yield found
    elif inspect.isclass(found):
        yield from (v for n, v in vars(found).items() if inspect.isfunction(v) and not n.startswith("_"))
    elif isinstance(found, types.ModuleType):
        yield from (v for v in (getattr(found, n) for n in _names(found)) if inspect.isfunction(v))


def _raises(function):
    """Whether its own body raises, not that of a function within."""
    lines = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(lines).body
    inner = {n for f in ast.walk(node) if f is not node and isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    return any(isinstance(n, ast.Raise) and n.exc and n not in inner for n in ast.walk(node))


def test_public_docstrings_say_what_is_raised():
    functions = {f for module, name in PUBLIC for f in _functions(module, name) if f.__module__.startswith("mimicnorm")}
    silent = [f for f in functions if _raises(f) and "raise" not in (inspect.getdoc(f) or "").lower()]
    assert not silent, "\n".join(sorted(f"{f.__module__}.{f.__qualname__}" for f in silent))


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None
    assert newest is not None
    assert project["version"] == citation[1] == newest[1]
