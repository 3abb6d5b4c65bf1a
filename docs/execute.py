"""Runs the notebooks of docs/notebooks on a CPU and writes their pages, with what they print and draw.

  python -m docs.execute [--all]

A page holds the digest of its notebook. Notebooks whose page is of this very text are left out but for --all; the build
of the site refuses pages that are not. Needs the extras [docs] and [plan]."""

import argparse
import base64
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent / "notebooks"
SETUP = """import matplotlib
matplotlib.rcParams |= {"figure.dpi": 110, "figure.constrained_layout.use": True}"""


def digest(path: Path) -> str:
    """The line that names the text that a page is of."""
    return f"<!-- executed from {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]} -->"


def stale() -> list[Path]:
    """Notebooks whose page is missing or of another text."""
    pages = {path: path.with_suffix(".md") for path in sorted(NOTEBOOKS.glob("*.py"))}
    return [path for path, page in pages.items() if not page.exists() or digest(path) not in page.read_text()]


def _outputs(cell: Any, stem: str) -> str:
    """What a cell printed and drew, as Markdown; its figures are written beside the page."""
    text = ""
    for output in cell.get("outputs", []):
        if "image/png" in output.get("data", {}):
            path = NOTEBOOKS / f"{stem}-{len(list(NOTEBOOKS.glob(f'{stem}-*.png'))) + 1}.png"
            path.write_bytes(base64.b64decode(output["data"]["image/png"]))
            text += f"\n![what the cell draws]({path.name})\n"
        elif output.get("name") != "stderr":
            said = output.get("text") or output["data"].get("text/plain", "")
            text += f"\n```text\n{said.rstrip()}\n```\n"
    return text


def execute(path: Path) -> None:
    """Runs one notebook from its first cell on, and writes its page.

    Raises:
      CellExecutionError: of nbclient, if a cell fails.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    started = time.monotonic()
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True).execute()
    for figure in NOTEBOOKS.glob(f"{path.stem}-*.png"):
        figure.unlink()
    text = ""
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            text += f"\n{cell.source}\n"
        else:
            text += f"\n```python\n{cell.source.strip()}\n```\n{_outputs(cell, path.stem)}"
    text += f"\nThis page is [a script]({path.name}) as it ran (`python -m docs.execute`).\n\n{digest(path)}\n"
    path.with_suffix(".md").write_text(text.lstrip())
    print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="those too whose page is of this text")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for path in sorted(NOTEBOOKS.glob("*.py")) if parser.parse_args().all else stale():
        execute(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
