"""Writing checkpoints beside the training, so that it stands still only while the tensors are copied."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Thread, get_native_id

from ft.checkpoint.snapshot import Snapshot
from ft.io.atomic import Executor

PATIENCE = 60.0  # seconds for which a save may wait for idle processors


class Saver:
    """Writes snapshots in a thread, one at a time, and tells of disks that refuse.

    A full disk, a quota or a folder that has gone is no reason to stop a run: what could not be written is said, and
    the next save tries again. `failure` is the error of the newest save, None if it went well.
    """

    def __init__(
        self, write: Callable[[Snapshot, Executor], None], say: Callable[[str], None], *, blocking: bool
    ) -> None:
        """`write` puts a snapshot on the disk, `say` prints a line; `blocking` waits for each save to end."""
        self._write, self._say, self.blocking = write, say, blocking
        self._thread: Thread | None = None
        self._hurry = Event()
        self._defect: BaseException | None = None
        self.failure: OSError | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, after waiting for the one before."""
        self.wait()
        if self.blocking:
            self._hurry.set()
        else:
            self._hurry.clear()
        self._thread = Thread(target=self._work, args=(snapshot,), name="checkpoint")
        self._thread.start()
        if self.blocking:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written. What went wrong in the thread and is no matter of the disk is raised."""
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._thread = None
        if self._defect is not None:
            defect, self._defect = self._defect, None
            raise defect

    def refused(self, step: int, error: OSError) -> None:
        """The disk did not take the checkpoint of this step."""
        self.failure = error
        self._say(
            f"WARNING: checkpoint {step} could not be written: {error.strerror or error}. The run goes on and tries "
            "again at the next one; those written before are untouched."
        )

    def _work(self, snapshot: Snapshot) -> None:
        try:
            with ThreadPoolExecutor(1, "idle") as idle:
                _yield_to_others()
                self._write(snapshot, _run_at_idle_priority(idle, self._hurry))
            self.failure = None
        except OSError as error:
            self.refused(snapshot.state.step, error)
        except BaseException as error:
            self._defect = error


def _run_at_idle_priority(idle: ThreadPoolExecutor, hurry: Event) -> Executor:
    """Have each piece of work done by a thread that runs only while a processor has nothing else to do.

    The threads of a matrix product wait for each other: one that is held up for a moment holds up all. On a machine
    that is never idle that thread would never end, and only privileged processes can raise a thread's rank again. So
    when somebody waits, or `PATIENCE` has run out, the calling thread does the pieces that are left.
    """
    deadline = time.monotonic() + PATIENCE
    if not idle.submit(_run_when_idle).result():
        hurry.set()

    def do(work: Callable[[], None]) -> None:
        if hurry.is_set() or time.monotonic() >= deadline:
            work()
        else:
            idle.submit(work).result()

    return do


def _run_when_idle() -> bool:
    """Rank this thread behind everything else; says whether the system does."""
    if sys.platform != "linux":
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # some containers forbid it
        return False
    return True


def _yield_to_others() -> None:
    """Rank this thread behind the training's, on systems that rank threads."""
    if sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it, and nothing depends on it
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
