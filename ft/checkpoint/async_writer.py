"""Write checkpoints in a background thread: training waits only while the tensors are copied."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from ft.checkpoint.snapshot import Snapshot


class AsyncWriter:
    """Writes snapshots in a background thread of low priority, one at a time.

    A full disk, a quota or a missing directory does not stop the run: a warning is printed, and the next save tries
    again. `failure` is the error of the newest save, None if it succeeded.
    """

    def __init__(self, write: Callable[[Snapshot], None], print_line: Callable[[str], None], *, blocking: bool) -> None:
        """`write` writes a snapshot to the disk, `print_line` prints for the user; with `blocking`, `save` waits."""
        self._write, self._print_line, self._blocking = write, print_line, blocking
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self.failure: OSError | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start to write a snapshot, after waiting for the previous one."""
        self.wait()
        self._written = self._thread.submit(self._write_in_thread, snapshot)
        if self._blocking:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises an error of the thread that is not an `OSError`."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is still being written."""
        return self._written is not None and not self._written.done()

    def report_failure(self, step: int, error: OSError) -> None:
        """Record that the checkpoint of this step could not be written, and print a warning."""
        self.failure = error
        self._print_line(
            f"WARNING: checkpoint {step} could not be written: {error.strerror or error}. The run continues and "
            "tries again at the next one; earlier checkpoints are not affected."
        )

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        if sys.platform == "linux":  # where each thread has its own priority
            with suppress(OSError):  # some containers forbid it
                os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))
        try:
            self._write(snapshot)
            self.failure = None
        except OSError as error:
            self.report_failure(snapshot.state.step, error)
