"""Files of a run directory: opened only where they are regular files, deleted without following a link.

A run directory may come from somebody else, or be rearranged by hand. What a run writes or deletes there never reaches
a file outside it, and no FIFO is waited for.
"""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from ft.errors import FtError

# A FIFO is opened without waiting for its other end; on regular files the flag does nothing.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)


def open_to_write(path: Path) -> int:
    """Open a regular file for reading and appending, or create it.

    Returns:
        Its descriptor.

    Raises:
        FtError: `path` is a link, which would lead elsewhere, a FIFO, a directory or a device.
        OSError: the system refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _WITHOUT_WAITING
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    refuse_special(path)
    return os.open(path, flags, 0o666)


def refuse_special(path: Path) -> None:
    """Refuse to write to a name that something else than a regular file has.

    Raises:
        FtError: `path` is a link, a FIFO, a directory or a device.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise FtError(f"{path} is a {kind}, only a regular file is written to: delete it, or put the file itself there")


def read_regular(path: Path) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _WITHOUT_WAITING)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def remove(path: Path) -> None:
    """Delete a file, a link, or a directory with all in it, as far as the system allows; not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
