"""What a command tells on a terminal: plain lines, a progress bar, a table."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def log_line(text: str) -> None:
    """Prints a line, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def progress(
    items: Iterable[Item], title: str, total: int, steps: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Passes items through, with a progress bar on a terminal and nothing elsewhere.

    Args:
      items: to pass through.
      title: of the bar.
      total: steps in all items.
      steps: how many of them an item is.
    """
    with tqdm(None, title, total, leave=False, disable=not sys.stderr.isatty(), unit="step") as bar:
        for item in items:
            yield item
            bar.update(steps(item))


def table(rows: dict[str, Any]) -> str:
    """Two columns, names and values."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
