"""`gnbench-report`: tables, figures and one HTML page of the runs in a directory. Reads records; needs no torch."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from gnbench.analysis.check import check_runs
from gnbench.analysis.watch import add_watch, watch_report
from gnbench.console import as_command
from gnbench.errors import UserError

WATCH_S = 30.0  # between two looks of --watch: a report takes seconds to draw


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if --check found fault, 2 with a sentence where DIR cannot be used."""
    options = make_parser().parse_args(argv)
    try:
        if options.check and options.where is not None:
            raise UserError("--check looks at all runs of its directories: it takes no --where")
        if options.check:
            return _print_check(options.directories)
        if len(options.directories) > 1 and options.out is None:
            raise UserError("--out is needed with more than one directory: it says where the report goes")
        if options.where is not None and options.out is None:
            raise UserError("--out is needed with --where: the directory's own report is of all its runs")
        out = Path(options.out or options.directories[0])
        how = (options.decreasing, options.reference, check_margin(options.margin), options.where)
        if options.watch is not None:
            return _watch(options.directories, out, options.watch, how)
        paths, sentence = _import_page().write_report(options.directories, out, *how)
    except UserError as error:
        print(f"gnbench-report: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    print(sentence)
    return 0


def _watch(directories: Sequence[str], out: Path, every_s: float, how: tuple) -> int:
    """Write the report again and again; its page loads itself anew as long as somebody writes it."""
    how = (*how, math.ceil(every_s))
    try:
        watch_report(lambda: _import_page().write_report(directories, out, *how), directories, every_s)
    finally:
        _import_page().stop_refreshing(out)
    return 0


def _import_page() -> ModuleType:
    """The module that draws; pandas and matplotlib take a second to import, for which --help need not wait."""
    from gnbench.analysis import page

    return page


def _print_check(directories: Sequence[Path | str]) -> int:
    findings = [finding for directory in directories for finding in check_runs(directory)]
    print("\n".join(map(str, findings)) or "nothing is wrong")
    return 1 if findings else 0


def make_parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        prog="gnbench-report", description="Tables, figures and report.html of the runs that stand in a directory."
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="holds runs, as DIR/<run>/record.json")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: the directory itself)")
    parser.add_argument(
        "--where",
        metavar="QUERY",
        help="only the runs that fit a condition in pandas' words on the columns of gnbench.load: "
        "\"norm in ['bn', 'gn'] and batch_size > 2\"",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--decreasing", action="store_true", default=True, help="from the largest batch to the smallest (the default)"
    )
    order.add_argument("--increasing", dest="decreasing", action="store_false", help="from the smallest to the largest")
    parser.add_argument("--reference", action="store_true", help="lay numbers that others published behind the figures")
    parser.add_argument(
        "--margin",
        default="1",
        metavar="POINTS",
        help="points of error that count as a change in the claims (default: 1)",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say what is wrong with each run's directory")
    add_watch(action, WATCH_S, "draw everything again whenever a record has changed")
    return parser


def check_margin(text: str) -> float:
    """The number of `--margin`.

    Raises:
        UserError: it is not a number above 0.
    """
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not 0 < margin < math.inf:
        raise UserError(f"--margin {text} is not legal: it is a number of points above 0")
    return margin


if __name__ == "__main__":
    sys.exit(main())
