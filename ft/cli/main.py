"""Entry point of the command line: dispatch to a command, print errors, return the exit status."""

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from ft.cli.arguments import COMMANDS, HELP_PAGES, RUN_FLAG_COMMANDS, TRAINING_PAGE, read_arguments
from ft.errors import FtError, Stopped, UsageError, is_out_of_memory, remedy_of, sentence, shown
from ft.io.standard_streams import LOADING, standard_streams, waiting_line
from ft.train.signals import interrupts_on_signals, report_interrupt

LATER = 1.0  # seconds

# The remedy when memory runs out where no `explain_out_of_memory` has a better one.
LESS_MEMORY = "use fewer or shorter examples at once (--batch-size and --max-length, where the command has them)"


def main(arguments: Sequence[str]) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for wrong usage, 128 + n for signal n.
    """
    if "--quiet" in arguments:  # before huggingface_hub is imported, which reads it then
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
    has_begun = False
    try:
        if arguments[:1] == ["help"]:
            arguments = _arguments_for_help(arguments[1:])
        if arguments and arguments[0] in COMMANDS:
            module, function = COMMANDS[arguments[0]]
            getattr(import_module(module), function)(arguments[1:])
            return 0
        module, function, page = "ft.finetune", "fine_tune", TRAINING_PAGE
        if arguments and arguments[0] in RUN_FLAG_COMMANDS:
            (module, function), page = RUN_FLAG_COMMANDS[arguments[0]], HELP_PAGES[arguments[0]]
            arguments = arguments[1:]
        config = read_arguments(arguments, page)
        place, has_begun = config.output_dir, True
        if function == "fine_tune":
            advice = "; --resume continues from the newest checkpoint"
            make_output_optional()
        # Imported only now: importing torch takes seconds, for which --help and usage errors do not wait.
        with waiting_line(LOADING, quiet=config.quiet):
            command = getattr(import_module(module), function)
        command(config)
    except UsageError as error:
        if not has_begun and os.environ.get("LOCAL_RANK", "0") != "0":
            # All processes that torchrun has started on a machine read the same command line, and one prints what is
            # wrong: it must end first, as torchrun then ends the others.
            time.sleep(LATER)
            return 2
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


def _arguments_for_help(words: Sequence[str]) -> list[str]:
    """The command line that `help [COMMAND]` stands for.

    Raises:
        UsageError: there is no such command, or there are several words.
    """
    commands = [*COMMANDS, *RUN_FLAG_COMMANDS]
    if len(words) > 1:
        raise UsageError(f"help takes one command, not {len(words)}: it is one of {', '.join(commands)}")
    if words and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1) or [", ".join(commands)]
        raise UsageError(f"there is no command {shown(words[0])}, is it {near[0]}?")
    return [*words, "--help"]
