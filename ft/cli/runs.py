"""The command `runs`: a table of the runs below a directory: `python run.py runs [DIR]`."""

from collections.abc import Sequence
from pathlib import Path

from ft.cli.parsers import CommandParser, to_path
from ft.errors import UsageError, shown
from ft.report.run_table import SORT_KEYS, as_csv, as_json, as_text, read_table, require_runs, sorted_rows

EXAMPLES = """\
examples:
  python run.py runs                                 all runs below runs/, the best first
  python run.py runs sweeps --sort test_accuracy
  python run.py runs --csv > runs.csv
"""


def runs(arguments: Sequence[str]) -> None:
    """Parse the command line, read the runs, and print the table.

    Raises:
        UsageError: the command line is wrong, or there is no such directory.
        FtError: there is no run.
    """
    parser = CommandParser(
        "runs", "List the runs below a directory: state, settings that differ, figures, time and memory.", EXAMPLES
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", type=to_path, default=Path("runs"), help="default: runs")
    parser.add_argument(
        "--sort",
        metavar="KEY",
        choices=SORT_KEYS,
        default="best",
        help=f"by which figure: {', '.join(SORT_KEYS)} (default: best, the best validation by --best-metric, for each "
        "set of validation rows in turn)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--csv", action="store_true", help="print CSV instead of a table; control characters are escaped"
    )
    options = parser.parse_args(arguments)
    problems = list(parser.problems)
    if options.json and options.csv:
        problems.append("--json and --csv are two formats: give one of them")
    if not options.directory.is_dir():
        problems.append(f"DIR is {shown(str(options.directory))}, there is no such directory")
    if problems:
        raise UsageError(*problems)
    rows = sorted_rows(read_table(options.directory), options.sort)
    require_runs(rows, options.directory)
    if options.csv:
        print(as_csv(rows), end="")
    else:
        print(as_json(rows) if options.json else as_text(rows))
