"""Compares runs of `mimicnorm train`, finished or not, on one HTML page with its figures inside.

  mimicnorm report runs/digits-resnet8-mimicnorm-seed0 --out report.html
  mimicnorm report runs/* --out report.html

Runs whose configs differ by seed alone are shown as their mean and range. Exit code: 0 when done, 2 for bad input."""

import argparse
from pathlib import Path

from mimicnorm_jax.cli.command import run
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.monitoring.page import page
from mimicnorm_jax.monitoring.run_folders import read_runs
from mimicnorm_jax.utils.files import write_text


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="mimicnorm report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="workdir of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    return run(lambda: _report(arguments), "interrupted; nothing was written")


def _report(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise UserError(f"--out={out}: the page's file ends in .html")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}; create it first")
    runs = read_runs(arguments.runs)
    try:
        write_text(out, page(runs))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error}") from error
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 2**10:,.0f} KiB")
    return 0
