"""A lock on a directory, held until the process ends."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ft.errors import FtError
from ft.io.plain_files import is_at, open_to_write

if sys.platform != "win32":
    import fcntl


LOCK = ".lock"


class FolderLock:
    """A folder that this process has for itself, by a lock on a file in it."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be, and lock it.

        Raises:
            FtError: another process has it, or seems to on a file system without locks; the file is a link or a FIFO.
            OSError: the folder cannot be made or written.
        """
        self.folder, self._file = folder, _locked_file(folder)

    def restore(self) -> bool:
        """Take the lock again if the folder or the file has been moved or deleted; says whether it has.

        Raises:
            FtError: another process has taken it meanwhile.
            OSError: the folder cannot be made or written.
        """
        if is_at(self._file.fileno(), self.folder / LOCK):
            return False
        try:
            file = _locked_file(self.folder)
        except FtError as error:
            raise FtError(f"{self.folder} was moved or deleted during the run, which ends here: {error}") from error
        self._close()
        self._file = file
        return True

    def release(self) -> None:
        """Give the folder back, and delete it if it was empty all along."""
        with suppress(OSError):  # another process may be coming in, or the folder is gone
            if [entry.name for entry in self.folder.iterdir()] == [LOCK] and is_at(
                self._file.fileno(), self.folder / LOCK
            ):
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self._close()

    def _close(self) -> None:
        with suppress(OSError):
            self._file.truncate(0)  # so that a number stands only there where a process has died
        self._file.close()


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Have a folder for oneself, until the process ends, however it ends: see `FolderLock`."""
    lock = FolderLock(folder)
    try:
        yield lock
    finally:
        lock.release()


def _locked_file(folder: Path) -> io.FileIO:
    """The file of a folder's lock, which this process has locked and put its number into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except RecursionError as error:  # which is how `pathlib` makes parents
        raise FtError(f"{folder} is too deep: it has {len(folder.parts):,} parts") from error
    path = folder / LOCK
    while True:
        file = os.fdopen(open_to_write(path), "r+b", buffering=0)
        try:
            _take(file, folder)
        except FtError:
            file.close()
            raise
        if is_at(file.fileno(), path):
            break
        file.close()  # its owner deleted it just now: once more with a new one
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file


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
