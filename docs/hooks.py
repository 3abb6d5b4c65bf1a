"""Hooks of the site: pages from elsewhere in the repository, links between them, formulas as MathML."""

import html
import logging
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs puts no folder of its own there
from docs.execute import stale  # noqa: E402

MOVED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Files of the repository by their place in the site; those of docs/ and benchmarks/ keep theirs."""
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def _site(path: str) -> str:
    return MOVED.get(path, path.removeprefix("docs/"))


def _repository(uri: str) -> str:
    inverse = {place: path for path, place in MOVED.items() if path != "README.md"}
    return inverse.get(uri, uri if uri.startswith("benchmarks/") else f"docs/{uri}")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures that the repository keeps outside of docs/."""
    for notebook in stale():
        logging.getLogger("mkdocs.hooks").warning(f"{notebook.name} was changed: python -m docs.execute")
    benchmarks = (p for p in (ROOT / "benchmarks").rglob("*") if p.suffix in (".md", ".png", ".json"))
    for path in [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(benchmarks)]:
        uri = _site(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links between files of the repository to their places in the site."""
    source = PurePosixPath(_repository(page.file.src_uri))

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / match[1])
        if ":" in match[1] or not (ROOT / target).is_file():
            return match[0]
        relative = os.path.relpath(_site(target), os.path.dirname(page.file.src_uri) or ".")
        return f"]({relative}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()[2:-2]
        return convert(text, display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, content)
