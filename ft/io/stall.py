"""Work that waits for another machine, given up when nothing arrives for a while."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SILENCE = 5.0  # seconds without progress after which the wait is shown
INTERVAL = 0.5  # seconds between two looks at the progress


class StalledError(Exception):
    """Nothing has arrived for too long; `seconds` is the limit."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"nothing arrived for {seconds:g} s")


def unless_stalled(work: Callable[[], T], progress: Callable[[], int], *, seconds: float, what: str) -> T:
    """The result of `work`, given up when `progress` stays the same for too long; meanwhile a countdown is shown.

    A thread cannot be stopped: the one of work that is given up ends with its own timeouts, or with the process.

    Args:
        work: what is done, in a thread of its own.
        progress: a number that changes whenever something has arrived.
        seconds: for how long it may stay the same.
        what: what is waited for, in the countdown.

    Raises:
        StalledError: it stayed the same for so long. What `work` raises is raised here too.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    is_terminal, shown = sys.stderr.isatty(), False
    last, since = progress(), time.monotonic()
    while thread.is_alive():
        thread.join(INTERVAL)
        now = time.monotonic()
        if (current := progress()) != last:
            last, since = current, now
        silent = now - since
        if silent >= SILENCE and thread.is_alive() and (is_terminal or not shown):
            text = f"Waiting for {what}: given up in {max(0.0, seconds - silent):.0f} s if nothing arrives"
            print(f"\r{text}\x1b[K" if is_terminal else text, end="" if is_terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
            shown = True
        elif shown and is_terminal and silent < SILENCE:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            shown = False
        if silent >= seconds and thread.is_alive():
            break
    if shown and is_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if failures:
        raise failures[0]
    if results:
        return results[0]
    raise StalledError(seconds)
