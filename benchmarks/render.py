"""Writes every page of results/ and every table of results in README.md and docs/ again, from the records.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, where NAME is one of those in tables/.

  python -m benchmarks.render
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import (
    binary,
    confirm_plan,
    fault_injection,
    fixed_norm,
    folded_inference,
    input_pipeline,
    large_steps,
    largest_batch,
    logit_scale,
    networks,
    quickstart,
    search,
    sharpness,
    step_memory,
    step_time,
    streaming,
    trainability,
)
from benchmarks._results import RESULTS, ROOT
from benchmarks.ntk import compare, digits, families, lower_bounds, pseudo_kernel
from benchmarks.paper import pages as paper_pages
from benchmarks.paper import reproduce
from benchmarks.tables import TABLES
from mimicnorm_jax.utils import log_line, write_text

BENCHMARKS: tuple[Any, ...] = (
    binary,
    confirm_plan,
    fault_injection,
    fixed_norm,
    folded_inference,
    input_pipeline,
    large_steps,
    largest_batch,
    logit_scale,
    networks,
    quickstart,
    search,
    sharpness,
    step_memory,
    step_time,
    streaming,
    trainability,
    compare,
    digits,
    families,
    lower_bounds,
    pseudo_kernel,
)
"""Modules with a STORE and a `page` of its records."""
README = ROOT / "README.md"
BEGIN, END = re.compile(r"<!-- results: (.*?) -->\n"), "<!-- end -->"


def documents() -> list[Path]:
    """The files whose tables are generated."""
    return [README, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def pages(folder: Path) -> Iterator[tuple[Path, str]]:
    """The pages of a folder, as they are to be: of each benchmark that has records there, and all of the paper's."""
    for module in BENCHMARKS:
        if records := list(module.STORE.read(folder).values()):
            yield folder / f"{module.STORE.name}.md", module.page(records)
    for study in reproduce.studies(folder):
        records = list(study.store.read(folder).values())
        yield folder / f"{study.name}.md", paper_pages.page(study, folder, records)


def filled(text: str, path: Path, results: Path = RESULTS) -> str:
    """A document with its tables as they are to be.

    Args:
      text: of the document.
      path: of it, below the repository; links to benchmarks/ become relative to its folder.
      results: folder of records.

    Raises:
      ValueError: names a table that there is not, or that has no end.
    """
    parts = BEGIN.split(text)
    above = os.path.relpath(ROOT, path.parent)
    prefix = "" if above == "." else f"{above}/"
    whole = parts[0]
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        if name not in TABLES:
            raise ValueError(f"{path} asks for results of {name!r}; there are {', '.join(sorted(TABLES))}")
        _, end, rest = part.partition(END)
        if not end:
            raise ValueError(f"{path}: results of {name!r} have no {END} behind them")
        table = TABLES[name](results).replace("](benchmarks/", f"]({prefix}benchmarks/")
        whole += f"<!-- results: {name} -->\n\n{table}\n\n{END}{rest}"
    return whole


def main() -> None:
    argparse.ArgumentParser(
        "python -m benchmarks.render", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for module in BENCHMARKS:
        module.STORE.tidy(RESULTS)
    texts = {path: filled(path.read_text(), path) for path in documents()} | dict(pages(RESULTS))
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
            log_line(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
