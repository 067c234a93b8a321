"""The exceptions of this program, and how their messages quote values (escaped and shortened) and name the program."""

import re
import reprlib
import shlex
import sys
from pathlib import PurePath

MAX_MESSAGE_LENGTH = 1500  # characters of one problem
MAX_PROBLEMS = 20  # reported at once; a wrong file as --config may have many more

_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = 200  # enough for most paths
_VALUES.maxlong = 40
_VALUES.maxlevel = 2


# How documentation and help name the program.
IN_REPOSITORY = "python run.py"


def program() -> str:
    """What the user types before the flags: `python run.py`, `ft`, or `python -m ft`, which always works."""
    name = PurePath(sys.argv[0]).name
    if name == "run.py":
        return IN_REPOSITORY
    return "ft" if name in ("ft", "ft.exe") else "python -m ft"


def printable(text: str, keep: str = "") -> str:
    r"""Escape what is not printable in text from a file, a flag or a model, such as control characters.

    Args:
        text: the text.
        keep: characters that are not escaped, such as a line break.

    Returns:
        The text with Python's escapes (`\x1b`, `\u202e`, `\n`) for characters that are not printable.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: a command line's other bytes, and JSON's escapes, may be surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value as a message quotes it: its `repr`, shortened in the middle if it is long."""
    return _VALUES.repr(value)


def quoted(path: object) -> str:
    """A path or name as a word of a command line that a message suggests, quoted for the shell if it needs it."""
    word = printable(str(path))
    if sys.platform == "win32":
        return f'"{word}"' if " " in word else word
    return shlex.quote(word)


def one_line(text: str, width: int = 60) -> str:
    """A text for a table or a list: printable, on one line, shortened at the end if it is long."""
    words = " ".join(text.split())
    line = printable(words[: width + 1])  # escapes are up to ten times as long
    return line if len(line) <= width else line[: width - 4] + " ..."


def counted(number: int, noun: str) -> str:
    """A number with a noun that has a regular plural: `1 example`, `1,066 examples`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sentence(message: str) -> str:
    """A message on one line, printable, shortened in the middle: its start has the cause, its end the remedy."""
    half = MAX_MESSAGE_LENGTH // 2
    if len(message) > MAX_MESSAGE_LENGTH:
        message = f"{message[:half]} ... {message[-half:]}"
    message = printable(message)  # up to ten times as long
    return message if len(message) <= MAX_MESSAGE_LENGTH else f"{message[:half]} ... {message[-half:]}"


# Parts of the messages of a RuntimeError that PyTorch raises for a device. cuBLAS allocates a workspace when its handle
# is created: if that fails, the memory of the GPU is full.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|allocate memory|STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"
)
_REMEDIES = {
    "no kernel image is available": (
        "this build of PyTorch has no kernels for the GPU: install one that has "
        "(https://pytorch.org/get-started/locally/), or use --device cpu"
    ),
    "busy or unavailable": (
        "the GPU is in use by another process, or reserved for one (nvidia-smi shows which): wait for it, or use "
        "another --device"
    ),
}


class FtError(Exception):
    """A failure with a message for the user: what happened, the value, the limit and the remedy.

    The command is right, and something else is wrong: the content of a file, the disk, memory, the network. What is
    wrong with the command itself is a `UsageError`. The command line prints the message without a traceback and exits
    with status 1. Any other exception is a bug of this program and keeps its traceback. The message is one line of
    printable characters, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class UsageError(FtError):
    """The command or a configuration must be changed; exits with status 2.

    It is a flag or value that is wrong, or the name of a path, column, split, label or Hub id that does not exist.
    `problems` has one sentence for each problem, so that all are reported at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(sentence, problems[:MAX_PROBLEMS]))
        if len(problems) > MAX_PROBLEMS:
            self.problems += (f"and {len(problems) - MAX_PROBLEMS:,} more problems",)
        Exception.__init__(self, "\n".join(self.problems))


class Stopped(Exception):  # noqa: N818, not an error
    """A signal stopped the run after it was saved; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of the CPU or of an accelerator."""
    return isinstance(error, MemoryError) or bool(
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
    )


def remedy_of(error: BaseException) -> str | None:
    """The remedy for an error of the device, in one sentence; None for an error that is a bug of this program."""
    return next((remedy for part, remedy in _REMEDIES.items() if part in str(error)), None)
