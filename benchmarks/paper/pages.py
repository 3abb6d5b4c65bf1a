"""Which page an experiment has, and writing it."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks._results import Record
from benchmarks.paper import comparison, convergence
from benchmarks.paper.comparison import Study
from mimicnorm_jax import plots


def _module(study: Study) -> ModuleType:
    return convergence if study.experiment.converged else comparison


def page(study: Study, folder: Path, records: Sequence[Record]) -> str:
    """The page of a study, with its figures where they lie in the folder.

    Args:
      study: whose page it is.
      folder: of the page.
      records: of finished runs.
    """
    return _module(study).page(study, folder, records)


def write(study: Study, folder: Path) -> None:
    """Writes NAME.md and, where matplotlib is installed, its figures, from NAME.jsonl in the same folder."""

    def drawn(records: list[Record]) -> str:
        if plots.available():
            for name, draw in _module(study).figures(study, records).items():
                draw(folder / name)
        return page(study, folder, records)

    study.store.write_page(folder, drawn)
