"""Stopping in good order when the system or the person asks for it by a signal."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from ft.errors import Stopped

# SIGTERM comes from `kill`, torchrun and job schedulers, SIGUSR1 from Slurm (--signal=USR1@60) before its time is up.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def interrupts_on_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1 do what Ctrl-C does, with the signal's number in the `KeyboardInterrupt`.

    They would end the process where it stands otherwise. So it is before the first step and after the last, where
    there is nothing to be saved; in between a `StopRequest` takes over.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread ask for signals
        previous = {number: signal.signal(number, interrupt) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Notes that one of `SIGNALS` has come, while used as a context manager; a second Ctrl-C ends the process at once.

    With several processes, `agree` makes the highest of their signal numbers known to all: each call is an exchange, to
    which all must come, so that they stop at the same place.

    Python runs the handler between two operations of the main thread, so that a matrix product is never cut short.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self._agree = agree
        self._number = 0  # of the signal that has come to this process
        self._agreed = 0  # of one that all know of
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread ask for signals
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)
        self._number = number
        self._interrupted = self._interrupted or number == signal.SIGINT
        again = " (Ctrl-C again: leave at once)" if number == signal.SIGINT else ""
        with suppress(OSError):  # whoever read the messages may be gone, killed by the same Ctrl-C
            # Not by print(), which the handler may have interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving{again}\n".encode())

    def __call__(self) -> bool:
        """Whether the run should stop."""
        self._agreed = self._agree(self._number)
        return self._agreed > 0

    def stopped(self, message: str) -> Stopped:
        """The error that ends the run, with the exit status that shells give to a signal: 128 and its number."""
        return Stopped(message, status=128 + self._agreed)
