"""Standard output and standard error that may be closed or full: errors name the stream, and a run continues."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from io import BufferedWriter, FileIO, TextIOBase, TextIOWrapper
from typing import Any

from ft.errors import printable

LOADING = "Loading PyTorch ..."


class _Stream(FileIO):
    """A standard stream whose first error is raised with its name, or, if `is_optional`, printed to standard error.

    Everything that is written after an error is dropped.
    """

    def __init__(self, descriptor: int, label: str, *, is_optional: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.label, self.is_optional, self._failed = label, is_optional, False

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]
        size = memoryview(data).nbytes
        if self._failed:
            return size
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            reason = "Closed" if error.errno == errno.EBADF else error.strerror
            if not self.is_optional:
                raise OSError(error.errno, reason, self.label) from error
            if sys.stderr.fileno() != self.fileno():
                print(f"WARNING: {self.label}: {reason}. The run continues without it.", file=sys.stderr)
            return size


@contextmanager
def standard_streams() -> Iterator[Callable[[], None]]:
    """A context in which both streams can always be written; characters outside their encoding are escaped.

    A closed descriptor is opened on the null device. Otherwise the next file to be opened would get its number, and
    messages would be written into that file.

    Yields:
        A function that makes standard output optional: from then on its first error is printed and not raised.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest free number: this one. Results that nobody can read are an error: a write fails.
            mode = os.O_RDONLY if descriptor == 1 else os.O_RDWR
            os.set_inheritable(os.open(os.devnull, mode), True)
    before = sys.stdout, sys.stderr
    opened = []
    for name, descriptor, label in (("stdout", 1, "standard output"), ("stderr", 2, "standard error")):
        stream = getattr(sys, name)
        # Not if a caller has replaced the stream, and not on Windows, whose consoles do not accept bytes.
        if stream is None or (stream is getattr(sys, f"__{name}__") and sys.platform != "win32"):
            raw = _Stream(descriptor, label, is_optional=name == "stderr")
            encoding = getattr(stream, "encoding", "utf-8")
            by_line = name == "stderr" or raw.isatty()
            setattr(sys, name, TextIOWrapper(BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line))
            opened.append(raw)
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def make_optional() -> None:
        for raw in opened:
            raw.is_optional = True

    try:
        yield make_optional
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = before


class _WarningsOnly(TextIOBase):
    """A stream that drops lines, but writes those that begin with `WARNING` to standard error."""

    def __init__(self, unfiltered: Any) -> None:  # noqa: ANN401
        self.unfiltered, self._line = unfiltered, ""

    def write(self, text: str, /) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith("WARNING"):
                print(line, file=sys.stderr)
        return len(text)


@contextmanager
def quiet_output(is_quiet: bool) -> Iterator[None]:
    """A context in which standard output shows the `results` alone, and standard error the warnings."""
    with redirect_stdout(_WarningsOnly(sys.stdout)) if is_quiet else nullcontext():
        yield


def results() -> AbstractContextManager[Any]:
    """A context whose output `quiet_output` does not drop."""
    return redirect_stdout(getattr(sys.stdout, "unfiltered", sys.stdout))


def print_notes(notes: Iterable[str], *, quiet: bool) -> None:
    """Print notes, a sentence each without its period, to standard error, unless `quiet`."""
    for note in () if quiet else notes:
        print(f"Note: {printable(note)}.", file=sys.stderr)


@contextmanager
def waiting_line(text: str, *, quiet: bool = False) -> Iterator[None]:
    """A context that shows a line on a terminal, and removes it at the end; a file or a pipe gets nothing."""
    is_shown = not quiet and sys.stderr.isatty()
    if is_shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
