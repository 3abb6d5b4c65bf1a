"""The reference is complete: every public name stands on one of its pages, with a docstring."""

import ast
import builtins
import collections.abc
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import textwrap
import tomllib
import types
import typing

import jax
import numpy as np

import mimicnorm_jax
from mimicnorm_jax import errors
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
DOCUMENTED = [path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
FUNCTION_NODES = (ast.FunctionDef, ast.Lambda, ast.AsyncFunctionDef)
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


FUNCTIONS = {f for module, name in PUBLIC for f in _functions(module, name) if f.__module__.startswith("mimicnorm")}
"""Public functions and methods of ours; what a closure or a hook of Flax is has no reader."""
FUNCTIONS = sorted(
    (f for f in FUNCTIONS if f.__name__ != "setup" and not re.search(r"^_|<locals>", f.__qualname__)),
    key=lambda f: (f.__module__, f.__qualname__),
)
OUR_ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value)}
ARRAYS = (jax.Array, np.ndarray)


def _doc(function):
    """Its docstring; empty where that sends the reader to another one, which is held to the same."""
    found = inspect.getdoc(function) or ""
    return "" if re.match(r"See `", found) else found


def _failing(fails):
    """Names of public functions with what `fails` says of their docstring and themselves."""
    found = {f"{f.__module__}.{f.__qualname__}": fails(_doc(f), f) for f in FUNCTIONS if _doc(f)}
    return "\n".join(f"{name}: {said}" for name, said in found.items() if said)


def _arguments(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in found if p.name not in ("self", "cls", "_")}


def _section(doc, title):
    """The lines of a section, without their indent."""
    found = re.search(rf"^{title}:\n((?:(?:  .*)?\n?)*)", doc, re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def test_docstrings_speak_of_every_argument():
    """Of several: in a section that names all, or in backticks, or where there is no section in words."""

    def silent(doc, function):
        names = _arguments(function)
        section = _section(doc, "Args")
        listed = set(re.findall(r"\w+", " ".join(re.findall(r"^([\w*, ]+):", section, re.MULTILINE))))
        quoted = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]*`", doc))))
        spoken = doc.lower() if not section else ""
        known = listed | quoted | {name for name in names if name.replace("_", " ").rstrip("s").lower() in spoken}
        return [] if len(names) < 2 else [name for name in names if name not in known]

    assert not (found := _failing(silent)), found


def _is_array(annotation):
    """Whether it is an array, or a tuple, list or dict of arrays."""
    if annotation in ARRAYS:
        return True
    is_function = typing.get_origin(annotation) is collections.abc.Callable
    return not is_function and any(map(_is_array, typing.get_args(annotation)))


def test_docstrings_state_the_shapes_of_arrays():
    """A shape in parentheses, or in words: any shape, a scalar, leaves of a tree, or as another name's."""
    shapes = r"`\([^`]*\)`|\bshapes?\b|\bscalar|\btree|\bleaves|\bas (in|for|of) `|\bsee `"

    def silent(doc, function):
        names = [name for name, annotation in _arguments(function).items() if name != "key" and _is_array(annotation)]
        names += ["what it returns"] * _is_array(inspect.signature(function).return_annotation)
        return [] if re.search(shapes, doc, re.IGNORECASE) else names

    assert not (found := _failing(silent)), found


def test_docstrings_of_formulas_name_their_source():
    """In functional, theory and linen: an equation, theorem, figure or publication; there or over the module."""
    source = r"[Ee]q(uation|\.)|[Ss]ection|[Tt]heorem|Figure|Table|[Aa]ppendix|arXiv|et al|published|\b(19|20)\d\d\b"

    def silent(doc, function):
        if not re.match(r"mimicnorm_jax\.(functional|theory|linen)", function.__module__) or "$" not in doc:
            return []
        module = sys.modules[function.__module__]
        owner = getattr(module, function.__qualname__.split(".")[0])
        places = (inspect.getdoc(found) or "" for found in (function, owner, module))
        return [] if any(re.search(source, place) for place in places) else ["a source"]

    assert not (found := _failing(silent)), found


def _body(function):
    """Nodes of its own body, not those of functions within."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    inner = {n for f in ast.walk(node) if f is not node and isinstance(f, FUNCTION_NODES) for n in ast.walk(f)}
    return [n for n in ast.walk(node) if n not in inner]


def _raised(function):
    """Names of what its own body raises."""
    raised = (n.exc for n in _body(function) if isinstance(n, ast.Raise))
    return {ast.unparse(e.func if isinstance(e, ast.Call) else e).rsplit(".", 1)[-1] for e in raised if e}


def _helpers(function):
    """Functions of ours that its body calls outside of a `try` with handlers."""
    body = _body(function)
    caught = {n for t in body if isinstance(t, ast.Try) and t.handlers for part in t.body for n in ast.walk(part)}
    for call in (n for n in body if isinstance(n, ast.Call) and n not in caught):
        name, found = ast.unparse(call.func), function.__globals__
        for part in name.split(".") if re.fullmatch(r"\w+(\.\w+)?", name) else ():
            found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
        found = inspect.unwrap(found) if inspect.isroutine(found) else None
        if inspect.isfunction(found) and found.__module__.startswith("mimicnorm"):
            yield found


def test_docstrings_say_what_is_raised():
    """What the body raises, and errors of ours that functions it calls raise; a class speaks for those under it."""

    def silent(doc, function):
        raised = _raised(function)
        raised |= {name for helper in _helpers(function) for name in _raised(helper) & OUR_ERRORS}
        said = set(re.findall(r"\w+(?:Error|Exception)\b", doc))
        found = {name: vars(errors).get(name) or getattr(builtins, name, None) for name in raised}
        families = {name: {c.__name__ for c in getattr(e, "__mro__", ())} | {name} for name, e in found.items()}
        return sorted(name for name, family in families.items() if not family & said and "as `" not in doc.lower())

    assert not (found := _failing(silent)), found


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None
    assert newest is not None
    assert project["version"] == citation[1] == newest[1]
