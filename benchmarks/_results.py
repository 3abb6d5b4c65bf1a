"""Records of measurements: where they are kept, what tells them apart, what they were measured on, tables of them."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mimicnorm_jax.utils import environment, lock, log_line, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Store:
    """The records of one benchmark: a file NAME.jsonl with one JSON object a line, and at most one record a key.

    Attributes:
      name: of the file.
      key: what tells a record from the others: the case and, where it matters, the machine.
      order: by what the file is sorted, stably; None: as the records came.
    """

    name: str
    key: Callable[[Record], Key]
    order: Callable[[Record], Any] | None = None

    def read(self, folder: Path) -> dict[Key, Record]:
        """The records of a folder, by key; of two with the same key the later one. None, if there is no file.

        Raises:
          ValueError: names the line that is no record of this store.
        """
        path = folder / f"{self.name}.jsonl"
        records = {}
        for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
            try:
                record = json.loads(text)
                records[self.key(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is no record of {self.name}: {error!r}; mend or delete it"
                ) from error
        return records

    def add(self, folder: Path, *records: Record) -> None:
        """Puts records into the file, in the place of those with their keys.

        Reads the file again, since another process may have added to it in the meantime; one adds at a time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            self._add(folder, *records)

    def _add(self, folder: Path, *records: Record) -> None:
        merged = list((self.read(folder) | {self.key(record): record for record in records}).values())
        ordered = sorted(merged, key=self.order) if self.order else merged
        write_text(folder / f"{self.name}.jsonl", "".join(json.dumps(record) + "\n" for record in ordered))

    def tidy(self, folder: Path) -> None:
        """Puts a file to which others may have appended into the form that `add` gives it."""
        if (folder / f"{self.name}.jsonl").exists():
            self.add(folder)

    def write_page(self, folder: Path, page: Callable[[list[Record]], str]) -> None:
        """Writes NAME.md beside the records, and puts these in order, to which others may have appended.

        Nothing is added to the folder until it is done; so figures that `page` draws are of the page's records.
        """
        path = folder / f"{self.name}.md"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (folder / f"{self.name}.jsonl").exists():
                self._add(folder)
            write_text(path, page(list(self.read(folder).values())))
        log_line(f"wrote {path}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process changes a folder's results, and keeps others waiting.

    Where the file system knows no locks, nobody waits.
    """
    if os.name == "nt":  # where a folder cannot be opened
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def make_parser(module: str, description: str | None, *, render: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    Args:
      module: whose command it is, below `benchmarks`.
      description: the module's docstring.
      render: whether it keeps records, from which its page can be written again.
    """
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of records and pages")
    if render:
        parser.add_argument("--render", action="store_true", help="measure nothing, write the page again")
    return parser


def study_parser(
    module: str, description: str | None, seeds: Sequence[int], *, data_dir: bool = True
) -> argparse.ArgumentParser:
    """The options of a study that goes on where it stopped, see `go_on`; with `data_dir`, where data sets are."""
    parser = make_parser(module, description)
    if data_dir:
        parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many minutes")
    return parser


def go_on(
    store: Store,
    arguments: argparse.Namespace,
    names: Sequence[str],
    todo: Iterable[tuple[Key, Callable[[], Record]]],
    told: Callable[[Record], str],
) -> list[Record]:
    """Measures what is still to do, keeping each record as it comes, and returns all that there are; ends without any.

    Args:
      store: of the study.
      arguments: of `study_parser`.
      names: of what tells a record from the others.
      todo: that, and what measures the rest of the record.
      told: of a new record, for whoever waits.
    """
    start = time.monotonic()
    for case, measure in () if arguments.render else todo:
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        record = dict(zip(names, case, strict=True)) | measure()
        log_line(f"{case}: {told(record)}, {record['cpu_seconds']} s")
        store.add(arguments.results, record | {"machine": machine()})
    records = list(store.read(arguments.results).values())
    if not records:
        sys.exit(f"{arguments.results} holds no results yet")
    return records


def machine() -> Record:
    """What a record is measured on: devices, cores, versions."""
    return environment.describe()


def machines(records: Iterable[Record]) -> str:
    """Every machine of some records, each once."""
    return "; ".join(sorted({json.dumps(record["machine"], sort_keys=True) for record in records})) or "none yet"


def versions(numbers: dict[str, str]) -> str:
    """Versions of packages for a reader."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def grouped(records: Iterable[Record], by: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by what they have in common, in the order of their first ones."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(by(record), []).append(record)
    return groups


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, *rows]
    text = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def mean_and_deviation(values: Sequence[float], mean: str = ".2f", deviation: str = ".2f") -> str:
    """Mean ± standard deviation in these formats; of one value that value, of none nothing."""
    if not values:
        return ""
    text = format(statistics.mean(values), mean)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), deviation)}"


def milliseconds(seconds: Sequence[float], digits: int) -> str:
    """Median and quartiles in ms."""
    low, _, high = statistics.quantiles(seconds, n=4)
    median, low, high = (f"{1e3 * value:,.{digits}f}" for value in (statistics.median(seconds), low, high))
    return f"{median} [{low}, {high}]"
