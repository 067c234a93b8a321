"""Entry point of the command line: dispatch to a command, print errors, return the exit status."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from ft.cli.arguments import COMMANDS, RUN_FLAG_COMMANDS, read_arguments
from ft.cli.parsers import CommandParser
from ft.errors import FtError, Stopped, UsageError, is_out_of_memory, remedy_of, sentence, shown
from ft.io.standard_streams import standard_streams
from ft.train.signals import interrupts_on_signals, report_interrupt

EXPLAIN_EXAMPLES = """\
examples:
  python run.py explain --demo
  python run.py explain --row 17 --learning-rate 2e-4
  python run.py explain --config runs/rotten_tomatoes/config.json --model runs/rotten_tomatoes/final
"""

# The remedy when memory runs out where no `memory_advice` has a better one.
LESS_MEMORY = "use fewer or shorter examples at once (--batch-size and --max-length, where the command has them)"


def main(arguments: Sequence[str]) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for wrong usage, 128 + n for signal n.
    """
    with standard_streams() as make_output_optional, interrupts_on_signals():
        try:
            status = _dispatch(arguments, make_output_optional)
        except SystemExit as end:  # of --help
            if failure := _flush_output():
                return failure
            raise end
        return status or _flush_output()


def _flush_output() -> int:
    """Flush standard output; returns the exit status, 0 for success."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return 128 + 13
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename or 'standard output'}", file=sys.stderr)
        return 1
    return 0


def _dispatch(arguments: Sequence[str], make_output_optional: Callable[[], None]) -> int:
    """Run a command, print its errors, and return the exit status."""
    place = "while reading or writing"
    advice = ""
    try:
        if arguments and arguments[0] in COMMANDS:
            module, function = COMMANDS[arguments[0]]
            getattr(import_module(module), function)(arguments[1:])
            return 0
        module, function = "ft.finetune", "fine_tune"
        if arguments and arguments[0] in RUN_FLAG_COMMANDS:
            (module, function), arguments = RUN_FLAG_COMMANDS[arguments[0]], arguments[1:]
        config = read_arguments(arguments)
        place = config.output_dir
        if function == "fine_tune":
            advice = "; --resume continues from the newest checkpoint"
            make_output_optional()
        # Imported only now: importing torch takes seconds, for which --help and usage errors do not wait.
        getattr(import_module(module), function)(config)
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        remedy = "out of memory: " + LESS_MEMORY if is_out_of_memory(error) else remedy_of(error)
        if remedy is None:
            raise
        detail = str(error).partition("\n")[0]
        print(f"error: {remedy}" + (f" ({detail})" if detail else ""), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python can flush the rest at exit
        return 128 + 13  # as if SIGPIPE had ended the process
    except OSError as error:  # full disks and missing permissions; reading input files raises FtError
        print(sentence(f"error: {error.strerror or error}: {error.filename or place}"), file=sys.stderr)
        return 1
    except Stopped as stopped:
        with suppress(OSError):  # as in ft/train/signals.py
            print(stopped, end="\n" if str(stopped) else "", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt as interrupt:
        return report_interrupt(interrupt, advice)
    return 0


def explain(arguments: Sequence[str]) -> None:
    """Parse the command line, which has --row beside the flags of a run, and follow that row through a step.

    Raises:
        UsageError: with one sentence for each problem.
        FtError: the inputs cannot be read.
    """
    parser = CommandParser(
        "explain", "Follow one training example through one training step, with all figures.", EXPLAIN_EXAMPLES
    )
    parser.epilog = "All flags of a run work too, such as --model and --learning-rate: python run.py --help"
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
    from ft.cli.explain import explain  # after parsing, since it imports torch

    explain(config, None if row is None else int(row))
