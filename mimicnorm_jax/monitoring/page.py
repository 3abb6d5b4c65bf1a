"""Runs beside each other as one HTML page that needs no other file and no network."""

import base64
import html
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimicnorm_jax import plots
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.monitoring.run_folders import RunFolder, differing_fields, labels
from mimicnorm_jax.training import workdir

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--soft); }
td.number, th.number { text-align: right; }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .4rem; }
figure img { display: block; width: 100%; height: auto; }
summary { cursor: pointer; padding: .3rem 0; }
.failed { color: #d33; white-space: normal; }
"""


def page(runs: Sequence[RunFolder]) -> str:
    """One self-contained HTML page: results, curves, what differs between the configs, and each run in full.

    Args:
      runs: at least one. Those whose configs differ by seed alone share a color, and show as mean and range.

    Raises:
      UserError: if matplotlib, which draws the curves, is not installed.
    """
    if not plots.available():
        raise UserError("a report needs matplotlib: pip install 'mimicnorm_jax[plots]'")
    names = labels(runs)
    by_label: dict[str, list[list[dict[str, Any]]]] = {}
    for name, run in zip(names, runs, strict=True):
        by_label.setdefault(name, []).append(run.rows)
    title = ", ".join(dict.fromkeys(f"{run.config.model} on {run.config.dataset}" for run in runs))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(*_results(names, runs)),
        "<h2>Loss and accuracy</h2>",
        _figure(lambda path: plots.curves(by_label, path), f"loss and accuracy by epoch of {', '.join(by_label)}"),
    ]
    if fields := differing_fields(runs):
        values = [[run.path.name, *(str(getattr(run.config, field)) for field in fields)] for run in runs]
        parts += ["<h2>What differs in the configs</h2>", _table(["run", *fields], values, 1)]
    if any(run.diagnostics for run in runs):
        parts.append("<h2>Diagnostics along the runs</h2>")
        parts += [_diagnostics(name, run) for name, run in zip(names, runs, strict=True) if run.diagnostics]
    parts += ["<h2>The runs</h2>", *map(_run, runs)]
    return _document(title, "\n".join(parts))


def _document(title: str, body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _results(names: Sequence[str], runs: Sequence[RunFolder]) -> tuple[list[str], list[list[str]], int]:
    header = [
        "run",
        "label",
        "seed",
        "epochs",
        "final accuracy",
        "best accuracy",
        "final test loss",
        "images/s",
        "minutes",
    ]
    rows = []
    for name, run in zip(names, runs, strict=True):
        last, best = run.rows[-1], max(run.rows, key=lambda row: (row["test_accuracy"], row["epoch"]))
        done = f"{last['epoch']}" if run.is_finished else f"{last['epoch']} of {run.config.epochs}"
        rows.append(
            [
                run.path.name,
                name,
                str(run.config.seed),
                done,
                f"{last['test_accuracy']:.2%}",
                f"{best['test_accuracy']:.2%} (epoch {best['epoch']})",
                f"{last['test_loss']:.4f}",
                f"{max(row['images_per_second'] for row in run.rows):,.0f}",
                f"{sum(row['seconds'] for row in run.rows) / 60:.1f}",
            ]
        )
    return header, rows, 2


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on stand right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i >= numbers_from else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{html.escape(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(header, "th")}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(draw: Callable[[Path], object], text: str) -> str:
    """A picture within the page; nothing where nothing was drawn."""
    with tempfile.TemporaryDirectory() as folder:
        draw(path := Path(folder) / "figure.svg")
        if not path.exists():
            return ""
        encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{encoded}"></figure>'


def _diagnostics(name: str, run: RunFolder) -> str:
    title = f"{name}, seed {run.config.seed}"
    return _figure(lambda path: plots.along_run(run.diagnostics, path, title), f"diagnostics along {title}")


def _run(run: RunFolder) -> str:
    machine = (run.summary or {}).get("machine") or {}
    state = "finished" if run.is_finished else f"not finished: epoch {run.rows[-1]['epoch']} of {run.config.epochs}"
    failed = f'<p class="failed">{html.escape(run.failure)}</p>' if run.failure else ""
    fields = [[name, str(value)] for name, value in (workdir.as_json(run.config) | machine).items()]
    return (
        f"<details><summary>{html.escape(str(run.path))}: {state}</summary>{failed}"
        f"{_table(['field', 'value'], fields, 2)}</details>"
    )
