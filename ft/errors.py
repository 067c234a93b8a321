"""The ways a run ends before its end: two that the user can mend, and one that was asked for.

And how text that this program did not write is put into its messages: escaped, and shortened.
"""

import re
import reprlib

LONGEST_MESSAGE = 1500  # characters of one sentence to the user
MOST_PROBLEMS = 20  # of a command line that are reported; more come of a file in the wrong place

_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = 200  # a path mostly fits
_VALUES.maxlong = 40
_VALUES.maxlevel = 2


def printable(text: str, keep: str = "") -> str:
    r"""Text from a file, a flag or a model, safe to print: what moves a cursor or hides its neighbors is escaped.

    Args:
        text: the text.
        keep: characters that are left as they are, such as a line break where there may be several lines.

    Returns:
        The text with Python's escapes (`\x1b`, `\u202e`, `\n`) for all characters that are not printable.
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
    """A value from a file, a flag or a name as a message quotes it: its `repr`, of a long one beginning and end."""
    return _VALUES.repr(value)


def one_line(text: str, width: int = 60) -> str:
    """A text or a label for a table or a list: on one line, of a long one the beginning, printable."""
    words = " ".join(text.split())
    return printable(words if len(words) <= width else words[: width - 4] + " ...")


def sentence(message: str) -> str:
    """A message on one line, printable; of a long one beginning and end, which say what is wrong and what helps."""
    half = LONGEST_MESSAGE // 2
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:half]} ... {message[-half:]}"
    message = printable(message)  # which makes it longer, up to ten times
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


# Parts of a RuntimeError that PyTorch raises for a device, and what they say about the machine. cuBLAS allocates a
# workspace when its handle is created: where that fails, the GPU's memory is full.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|allocate memory|STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"
)
_REMEDIES = {
    "no kernel image is available": (
        "this build of PyTorch has no kernels for the GPU: install one that has "
        "(https://pytorch.org/get-started/locally/), or take --device cpu"
    ),
    "busy or unavailable": (
        "the GPU is in use by another process, or reserved for one (nvidia-smi shows which): wait for it, or take "
        "another --device"
    ),
}


class FtError(Exception):
    """A failure with a message meant for the user: what happened, the value, the limit and the remedy.

    The command line prints the message without a traceback and exits with 1. Every other exception is a defect of
    this program and keeps its traceback. Whatever is quoted in the message, it is one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class UsageError(FtError):
    """The command line or a configuration is wrong; exits with 2, before any work was done.

    `problems` holds one sentence each, so that all of them are reported at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(sentence, problems[:MOST_PROBLEMS]))
        if len(problems) > MOST_PROBLEMS:
            self.problems += (f"and {len(problems) - MOST_PROBLEMS:,} more problems",)
        Exception.__init__(self, "\n".join(self.problems))


class Stopped(Exception):  # noqa: N818, as nothing is wrong
    """A signal has ended the run, after it was saved; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the CPU or of an accelerator, is full."""
    return isinstance(error, MemoryError) or bool(
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
    )


def remedy_of(error: BaseException) -> str | None:
    """What helps against an error of the device, in a sentence; None for an error that is a defect of the program."""
    return next((remedy for part, remedy in _REMEDIES.items() if part in str(error)), None)
