"""Writing checkpoints beside the training, so that it stands still only while the tensors are copied."""

import os
from collections.abc import Callable
from threading import Thread

from ft.checkpoint import Snapshot


class Saver:
    """Writes snapshots in a thread, one at a time, and tells of disks that refuse.

    A full disk, a quota or a folder that has gone is no reason to stop a run: what could not be written is said, and
    the next save tries again. `failure` is the error of the newest save, None if it went well.
    """

    def __init__(self, write: Callable[[Snapshot], None], say: Callable[[str], None], *, blocking: bool) -> None:
        """`write` puts a snapshot on the disk, `say` prints a line; `blocking` waits for each save to end."""
        self._write, self._say, self.blocking = write, say, blocking
        self._thread: Thread | None = None
        self._defect: BaseException | None = None
        self.failure: OSError | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, after waiting for the one before."""
        self.wait()
        self._thread = Thread(target=self._work, args=(snapshot,), name="checkpoint")
        self._thread.start()
        if self.blocking:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. What went wrong in the thread and is no matter of the disk is raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._defect is not None:
            defect, self._defect = self._defect, None
            raise defect

    def _work(self, snapshot: Snapshot) -> None:
        _yield_to_others()
        try:
            self._write(snapshot)
            self.failure = None
        except OSError as error:
            self.failure = error
            self._say(
                f"WARNING: checkpoint {snapshot.state.step} could not be written: {error.strerror or error}. The run "
                "goes on and tries again at the next one; those written before are untouched."
            )
        except BaseException as error:
            self._defect = error


def _yield_to_others() -> None:
    """Let this thread run only where a processor has nothing else to do, on systems that can.

    The threads of a matrix product wait for each other: one that is held up for a moment holds up all. On a machine
    that is busy with other programs as well this thread would hardly ever run, and keeps its rank.
    """
    if hasattr(os, "SCHED_IDLE") and os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0 is the calling thread
