"""The command `explain`: one training example on its way through one training step: `python run.py explain`."""

import re
from collections.abc import Sequence

from ft.cli.arguments import read_arguments
from ft.cli.parsers import CommandParser
from ft.errors import UsageError, shown
from ft.io.standard_streams import LOADING, waiting_line

EXAMPLES = """\
examples:
  python run.py explain --demo
  python run.py explain --row 17 --learning-rate 2e-4
  python run.py explain --config runs/demo/config.json --model runs/demo/final
"""


def explain(arguments: Sequence[str]) -> None:
    """Parse the command line, which has --row beside the flags of a run, and follow that row through a step.

    Raises:
        UsageError: with one sentence for each problem.
        FtError: the inputs cannot be read.
    """
    parser = CommandParser(
        "explain",
        "Follow one training example through one training step, with all figures. All flags of a run work too, such as "
        "--model and --learning-rate: python run.py --help lists them.",
        EXAMPLES,
    )
    parser.usage = f"{parser.prog} [FLAG ...]"
    parser.add_argument(
        "--row",
        metavar="N",
        nargs="?",
        const="",
        help="row of the training split, from 0 (default: the first that is read at the full learning rate)",
    )
    options, rest = parser.parse_known_args(arguments)
    problems: list[str] = []
    row = options.row
    if row is not None and not re.fullmatch("[0-9]{1,18}", row):
        problems.append(f"--row is {shown(row)}, it must be a whole number from 0" if row else "--row needs a value")
    try:
        config = read_arguments(rest)
        if config.resume is not None:
            problems.append("--resume continues a run, and explain trains none: pass its config.json with --config")
    except UsageError as error:
        problems += error.problems
    if problems:
        raise UsageError(*problems)
    with waiting_line(LOADING, quiet=config.quiet):
        from ft.explain.step import explain  # after parsing, since it imports torch
    explain(config, None if row is None else int(row))
