"""A lock on a directory, held until it is released or the process ends."""

import ctypes
import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ft.errors import FtError
from ft.io.plain_files import is_at, open_to_write

if sys.platform != "win32":
    import fcntl


LOCK = ".lock"
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would block; regular files ignore this flag
_TRIES, _PAUSE = 3, 0.05  # seconds between the tries: `is_locked` holds the lock for less
# From winnt.h, winbase.h and winerror.h.
_SYNCHRONIZE, _WAIT_TIMEOUT, _ERROR_ACCESS_DENIED = 0x00100000, 0x102, 5


class DirectoryLock:
    """An exclusive lock on a directory, by flock on a file in it; on Windows by the process id in that file."""

    def __init__(self, directory: Path) -> None:
        """Create the directory if it does not exist, and lock it.

        Raises:
            FtError: another process holds the lock, or may hold it, on Windows or a file system without locks; the file
                is a link or a FIFO.
            OSError: the directory cannot be created or written.
        """
        self.directory, self._file = directory, _locked_file(directory)

    def restore(self) -> bool:
        """Acquire the lock again if the directory or the file was moved or deleted; returns whether it was.

        Raises:
            FtError: another process has acquired it meanwhile.
            OSError: the directory cannot be created or written.
        """
        if is_at(self._file.fileno(), self.directory / LOCK):
            return False
        try:
            file = _locked_file(self.directory)
        except FtError as error:
            raise FtError(f"{self.directory} was moved or deleted during the run, which ends here: {error}") from error
        self._close()
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock, and delete the directory if nothing else is in it."""
        with suppress(OSError):  # another process may be acquiring it, or the directory is gone
            if [entry.name for entry in self.directory.iterdir()] == [LOCK] and is_at(
                self._file.fileno(), self.directory / LOCK
            ):
                (self.directory / LOCK).unlink()
                self.directory.rmdir()
        self._close()

    def _close(self) -> None:
        with suppress(OSError):
            self._file.truncate(0)  # a process id remains only if the process has died
        self._file.close()


def is_locked(directory: Path) -> bool:
    """Whether another process holds the lock of a directory. Reads only; nothing is created.

    The lock file has a process id while it is held, and after the process has died. So the lock itself is tried only if
    there is one: a process that is starting is not disturbed.
    """
    process = ""
    try:
        with open(directory / LOCK, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK)) as file:
            process = file.read(20).decode(errors="replace").strip()
            if not process:
                return False
            if sys.platform == "win32":
                return _is_running(process)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.EOPNOTSUPP) and _is_running(process)


@contextmanager
def locked(directory: Path) -> Iterator[DirectoryLock]:
    """Hold a `DirectoryLock`.

    The system releases a lock by flock when the process ends, however it ends. Elsewhere the lock counts as released
    when no process has the id in the file.
    """
    lock = DirectoryLock(directory)
    try:
        yield lock
    finally:
        lock.release()


def _locked_file(directory: Path) -> io.FileIO:
    """Open and lock the lock file of a directory, and write this process's id into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except RecursionError as error:  # which is how `pathlib` makes parents
        raise FtError(f"{directory} is too deep: it has {len(directory.parts):,} parts") from error
    path = directory / LOCK
    while True:
        file = os.fdopen(open_to_write(path), "r+b", buffering=0)
        try:
            _acquire(file, directory)
        except FtError:
            file.close()
            raise
        if is_at(file.fileno(), path):
            break
        file.close()  # its owner has just deleted it: retry with a new one
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file


def _acquire(file: io.FileIO, directory: Path) -> None:
    """Lock the lock file of a directory.

    On Windows and on a file system without locks, the lock counts as held if a process with the id in the file runs on
    this machine.

    Raises:
        FtError: another process holds the lock, or may hold it.
    """
    process = file.read(20).decode(errors="replace").strip() or "unknown"
    if sys.platform == "win32":
        reason = ""
    else:
        try:
            _flock(file)
            return
        except BlockingIOError:
            raise FtError(
                f"another run is using {directory}: process {process}. Wait for it, stop it (kill {process}), or use "
                "another --output-dir"
            ) from None
        except OSError:
            reason = ", whose file system has no locks"
    if _is_running(process):
        raise FtError(
            f"another run may be using {directory}{reason}: process {process} started one, and a process with this id "
            f"is running. If it is another program, delete {directory / LOCK}"
        )


def _flock(file: io.FileIO) -> None:
    """Lock a file exclusively, unless another process holds the lock for longer than `is_locked` does.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no locks.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not tries_left:
                raise
            time.sleep(_PAUSE)


def _is_running(process: str) -> bool:
    """Whether another process with this id is running on this machine."""
    if not re.fullmatch("[1-9][0-9]{0,8}", process) or int(process) == os.getpid():
        return False
    if sys.platform == "win32":  # where signal 0 is CTRL_C_EVENT, which interrupts the programs of the console
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = ctypes.c_void_p
        handle = kernel32.OpenProcess(_SYNCHRONIZE, False, int(process))
        if handle is None:
            return ctypes.get_last_error() == _ERROR_ACCESS_DENIED  # it belongs to another user
        state = kernel32.WaitForSingleObject(ctypes.c_void_p(handle), 0)
        kernel32.CloseHandle(ctypes.c_void_p(handle))
        return state == _WAIT_TIMEOUT
    try:
        os.kill(int(process), 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True
