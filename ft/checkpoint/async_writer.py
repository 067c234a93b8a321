"""Write checkpoints in a background thread: training waits only while the tensors are copied."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Thread, get_native_id

from ft.checkpoint.snapshot import Snapshot
from ft.io.atomic import Executor

IDLE_SECONDS = 60.0  # for which a save runs at idle priority


class Saver:
    """Writes snapshots in a background thread, one at a time.

    A full disk, a quota or a missing directory does not stop the run: a warning is printed, and the next save tries
    again. `failure` is the error of the newest save, None if it succeeded.
    """

    def __init__(
        self,
        write: Callable[[Snapshot, Executor], None],
        print_line: Callable[[str], None],
        *,
        blocking: bool,
        all_reduce_max: Callable[[int], int] = lambda number: number,
    ) -> None:
        """Start no thread yet.

        Args:
            write: writes a snapshot to the disk; its executor runs work at idle priority.
            print_line: prints a line for the user.
            blocking: `save` waits until the snapshot is written.
            all_reduce_max: of the ranks of the run, only one of which writes.
        """
        self._write, self._print_line, self.blocking = write, print_line, blocking
        self._all_reduce_max = all_reduce_max
        self._newest_step = 0
        self._has_reported_deferral = False
        self._thread: Thread | None = None
        self._urgent = Event()
        self._error: BaseException | None = None
        self.failure: OSError | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start to write a snapshot, after waiting for the previous one."""
        self.wait()
        self._newest_step, self._has_reported_deferral = snapshot.state.step, False
        if self.blocking:
            self._urgent.set()
        else:
            self._urgent.clear()
        self._thread = Thread(target=self._write_in_thread, args=(snapshot,), name="checkpoint")
        self._thread.start()
        if self.blocking:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def defers_save_after(self, step: int) -> bool:
        """Whether the save of this step is deferred, because the previous one is still being written on any rank.

        The writer then no longer runs at idle priority. The first deferral prints that `step` has no checkpoint.
        """
        if not self._all_reduce_max(int(self.is_writing)):
            return False
        self._urgent.set()
        if not self._has_reported_deferral:
            self._print_line(
                f"step {step:>6}  its checkpoint is deferred: that of step {self._newest_step} is being written"
            )
            self._has_reported_deferral = True
        return True

    def wait(self) -> None:
        """Wait until nothing is being written; raises an error of the thread that is not an `OSError`."""
        if self._thread is not None:
            self._urgent.set()
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def report_failure(self, step: int, error: OSError) -> None:
        """Record that the checkpoint of this step could not be written, and print a warning."""
        self.failure = error
        self._print_line(
            f"WARNING: checkpoint {step} could not be written: {error.strerror or error}. The run continues and "
            "tries again at the next one; earlier checkpoints are not affected."
        )

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        try:
            with ThreadPoolExecutor(1, "idle") as idle:
                _lower_priority()
                self._write(snapshot, _run_at_idle_priority(idle, self._urgent))
            self.failure = None
        except OSError as error:
            self.report_failure(snapshot.state.step, error)
        except BaseException as error:
            self._error = error


def _run_at_idle_priority(idle: ThreadPoolExecutor, urgent: Event) -> Executor:
    """An executor that runs work in a thread at idle priority, so that it takes no CPU time from training.

    The threads of a matrix product wait for each other: one that is preempted delays all. On a machine that is never
    idle the idle thread would never finish, and only privileged processes can raise a thread's priority again. So when
    `urgent` is set, or after `IDLE_SECONDS`, the calling thread runs the remaining work.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    if not idle.submit(_set_idle_priority).result():
        urgent.set()

    def run(work: Callable[[], None]) -> None:
        if urgent.is_set() or time.monotonic() >= deadline:
            work()
        else:
            idle.submit(work).result()

    return run


def _set_idle_priority() -> bool:
    """Give this thread idle priority (SCHED_IDLE). Returns whether the system allows it."""
    if sys.platform != "linux":
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # some containers forbid it
        return False
    return True


def _lower_priority() -> None:
    """Give this thread a lower priority than the training threads, where threads have one."""
    if sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it; the save only competes with training then
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
