"""A lock on a directory, held until the process ends."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ft.errors import FtError

if sys.platform != "win32":
    import fcntl


UNFINISHED, REPLACED, LOCK = ".unfinished-", ".replaced-", ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for oneself, until the process ends, however it ends. Leaves no folder that was empty all along.

    Raises:
        FtError: another process has it, or seems to on a file system without locks.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        # Not through a link, as what it leads to would be emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _take(file, folder)
        except FtError:
            file.close()
            raise
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        file.close()  # its owner deleted it just now: once more with a new one
    try:
        file.seek(0)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):
            file.truncate(0)  # so that a number stands only there where a process has died
        with suppress(OSError):  # another process may be coming in
            if [entry.name for entry in folder.iterdir()] == [LOCK]:
                path.unlink()
                folder.rmdir()
        file.close()


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
