"""The command `report`: an HTML report of one or more runs, in one file without scripts and network access.

python run.py report RUN ...
"""

from collections.abc import Sequence

from ft.cli.parsers import CommandParser, to_path
from ft.errors import FtError, UsageError, printable, shown
from ft.io.plain_files import atomic_write_text
from ft.report.run_record import Recorded, read_run

EXAMPLES = """\
examples:
  python run.py report runs/rotten_tomatoes                  writes runs/rotten_tomatoes/report.html
  python run.py report runs/low runs/high                    compares two runs, in runs/report.html
  python run.py report runs/*/ --output compared.html
"""


def report(arguments: Sequence[str]) -> None:
    """Parse the command line, read the runs, and write the report.

    Raises:
        UsageError: the command line is wrong, or a directory is not a run directory.
        FtError: matplotlib is not installed.
    """
    parser = CommandParser("report", "Write an HTML report of runs: curves, mistakes, settings.", EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=to_path, help="a run directory, finished or not")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=to_path,
        help="the file to write (default: report.html in the run directory, or beside it for several runs)",
    )
    options = parser.parse_args(arguments)
    runs: list[Recorded] = []
    problems = list(parser.problems)
    for directory in dict.fromkeys(options.runs):
        try:
            runs.append(read_run(directory))
        except UsageError as error:
            problems += error.problems
    output = options.output or (options.runs[0] if len(runs) == 1 else options.runs[0].parent) / "report.html"
    if options.output and not output.parent.is_dir():
        problems.append(f"--output is {shown(str(output))}, there is no directory {shown(str(output.parent))}")
    if output.exists() and not output.is_file():
        problems.append(f"--output is {shown(str(output))}, it must be a file")
    elif output.is_symlink():
        problems.append(f"--output is {shown(str(output))}, which is a link: delete it, or name the file itself")
    if problems:
        raise UsageError(*problems)
    try:
        from ft.report.html import page  # here, since matplotlib is optional
    except ImportError as error:
        raise FtError(f"the report needs matplotlib ({error}): pip install -e '.[plot]'") from error
    atomic_write_text(output, page(runs))
    print(f"{printable(str(output))}: {len(runs)} run{'s' * (len(runs) > 1)}, {output.stat().st_size / 1000:.0f} kB")
