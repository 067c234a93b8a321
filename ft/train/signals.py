"""Stop and save on a signal from the user or the system."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from ft.errors import Stopped

# SIGTERM is sent by `kill`, torchrun and job schedulers, SIGUSR1 by Slurm (--signal=USR1@60) before the time limit.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def interrupts_on_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1 raise `KeyboardInterrupt` as Ctrl-C does, with the signal number in it.

    This holds before the first step and after the last, when there is nothing to save. During training a `StopRequest`
    handles signals.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
        previous = {number: signal.signal(number, interrupt) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report_interrupt(interrupt: KeyboardInterrupt, advice: str = "") -> int:
    """Print which signal ended the program, and return the exit status of a shell: 128 and the signal's number."""
    number = int(next(iter(interrupt.args), signal.SIGINT))
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    print(f"\ninterrupted{by}{advice}", file=sys.stderr)
    return 128 + number


class StopRequest:
    """A context manager that records whether one of `SIGNALS` was received; a second Ctrl-C does not wait.

    It ends the process at once, or with `exits_on_second_interrupt=False` raises `KeyboardInterrupt`.

    Calling it returns whether to stop. In several processes `all_reduce_max` takes the maximum of their signal numbers,
    so that all ranks stop after the same step: all ranks must call it.

    Python runs signal handlers between two bytecode instructions of the main thread, never inside an operator.
    """

    def __init__(
        self, all_reduce_max: Callable[[int], int] = lambda number: number, *, exits_on_second_interrupt: bool = True
    ) -> None:
        self._all_reduce_max = all_reduce_max
        self._exits = exits_on_second_interrupt
        self._number = 0  # of the signal that this process received
        self._agreed = 0  # of the signal that any rank received
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            if not self._exits:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self._number = number
        self._interrupted = self._interrupted or number == signal.SIGINT
        again = " (Ctrl-C again: leave at once)" if number == signal.SIGINT else ""
        with suppress(OSError):  # the reader of a pipe may have ended by the same Ctrl-C
            # Not by print(): it is not reentrant, and the handler may have interrupted it.
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving{again}\n".encode())

    def __call__(self) -> bool:
        """Whether the run should stop."""
        self._agreed = self._all_reduce_max(self._number)
        return self._agreed > 0

    def stopped(self, message: str) -> Stopped:
        """The exception that ends the run, with the exit status that shells use for a signal: 128 plus its number."""
        return Stopped(message, status=128 + self._agreed)
