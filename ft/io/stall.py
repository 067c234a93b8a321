"""Run network work in a thread, with a timeout that starts anew whenever data arrives."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SILENCE = 5.0  # seconds without progress after which a countdown is printed
INTERVAL = 0.5  # seconds between two checks of the progress


class StalledError(Exception):
    """There was no progress for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"nothing arrived for {seconds:g} s")


def run_with_stall_timeout(work: Callable[[], T], progress: Callable[[], int], *, seconds: float, what: str) -> T:
    """Run `work` in a thread until it ends or stalls; a countdown on standard error shows a stall.

    Python cannot stop a thread: that of stalled work ends with its own timeouts, or with the process.

    Args:
        work: the function.
        progress: returns a number that changes whenever data has arrived.
        seconds: the timeout, for which `progress` may stay the same.
        what: what is waited for, for the countdown.

    Returns:
        The result of `work`.

    Raises:
        StalledError: `progress` stayed the same for `seconds`. An exception of `work` is raised here too.
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
            text = f"Waiting for {what}: timeout in {max(0.0, seconds - silent):.0f} s if nothing arrives"
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
