"""The command `report`: runs as one HTML file to look at, without a script and without the network.

python run.py report RUN ...
"""

from collections.abc import Sequence

from ft.cli.parsers import CommandParser, a_path
from ft.errors import FtError, UsageError, printable, shown
from ft.io.atomic import atomic_write_text
from ft.report.run_record import Recorded, read_run

EXAMPLES = """\
examples:
  python run.py report runs/rotten_tomatoes                  writes runs/rotten_tomatoes/report.html
  python run.py report runs/low runs/high                    two runs laid over each other, in runs/report.html
  python run.py report runs/*/ --output compared.html
"""


def report(arguments: Sequence[str]) -> None:
    """Read the command line and the runs, and write the file.

    Raises:
        UsageError: the command line is wrong, or a folder is no run.
        FtError: matplotlib is not there.
    """
    parser = CommandParser("report", "Runs as one HTML file: curves, mistakes, settings.", EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=a_path, help="the folder of a run, finished or going on")
    parser.add_argument(
        "--output", metavar="FILE", type=a_path, help="left out: report.html in the run's folder, of several beside it"
    )
    options = parser.parse_args(arguments)
    runs: list[Recorded] = []
    problems: list[str] = []
    for folder in dict.fromkeys(options.runs):
        try:
            runs.append(read_run(folder))
        except UsageError as error:
            problems += error.problems
    output = options.output or (options.runs[0] if len(runs) == 1 else options.runs[0].parent) / "report.html"
    if options.output and not output.parent.is_dir():
        problems.append(f"--output is {shown(str(output))}, there is no folder {shown(str(output.parent))}")
    if output.exists() and not output.is_file():
        problems.append(f"--output is {shown(str(output))}, it must be the name of a file")
    elif output.is_symlink():
        problems.append(f"--output is {shown(str(output))}, which is a link: delete it, or name the file itself")
    if problems:
        raise UsageError(*problems)
    try:
        from ft.report.html import page  # here, as matplotlib is not always there
    except ImportError as error:
        raise FtError(f"the report's curves need matplotlib ({error}): pip install -e '.[plot]'") from error
    atomic_write_text(output, page(runs))
    print(f"{printable(str(output))}: {len(runs)} run{'s' * (len(runs) > 1)}, {output.stat().st_size / 1000:.0f} kB")
