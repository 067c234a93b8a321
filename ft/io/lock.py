"""A lock on a directory, held until the process ends."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft.errors import FtError

if sys.platform != "win32":
    import fcntl

from ft.io.atomic import FolderLock

UNFINISHED, REPLACED, LOCK = ".unfinished-", ".replaced-", ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Have a folder for oneself, until the process ends, however it ends: see `FolderLock`."""
    lock = FolderLock(folder)
    try:
        yield lock
    finally:
        lock.release()


def _take(file: io.FileIO, folder: Path) -> None:
    """Lock the file of a folder's lock.

    A file system may know no locks. There the process whose number the file holds decides: whether one of that number
    lives on this machine.

    Raises:
        FtError: another process has it, or seems to.
    """
    if sys.platform == "win32":
        return
    process = file.read(20).decode(errors="replace").strip() or "unknown"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FtError(
            f"another run is at work in {folder}: process {process}. Wait for it, stop it (kill {process}), or "
            "take another --output-dir"
        ) from None
    except OSError:
        if _lives(process):
            raise FtError(
                f"another run may be at work in {folder}, whose file system has no locks: process {process} began one, "
                f"and there is such a process. If it is none of this program, delete {folder / LOCK}"
            ) from None


def _lives(process: str) -> bool:
    """Whether there is another process of this number."""
    if not re.fullmatch("[1-9][0-9]{0,8}", process) or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)  # which sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
