"""Files of a run directory: only regular files are opened, and links are not followed.

A run directory may come from someone else or be rearranged by hand. Writing and deleting in it never touches a file
outside it, and opening a FIFO never blocks.

Single files, these and those of `--output`, are written atomically.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ft.errors import FtError

UNFINISHED = ".unfinished-"  # prefix of what is still being written

# Opening a FIFO would block until its other end is open; regular files ignore this flag.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def open_to_write(path: Path) -> int:
    """Open a regular file for reading and appending, or create it.

    Returns:
        Its descriptor.

    Raises:
        FtError: `path` is a link, a FIFO, a directory or a device.
        OSError: the system refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NONBLOCK
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    refuse_special(path)
    return os.open(path, flags, 0o666)


def refuse_special(path: Path) -> None:
    """Raise if `path` exists and is not a regular file.

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
        raise FtError(f"{path} is a {kind}, it must be a regular file: delete it, or put the file itself there")


def read_regular(path: Path) -> bytes:
    """Read a regular file, or one that a link points to.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a directory tree, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FtError: the file cannot be read, is not JSON, or has another value.
    """
    try:
        value = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FtError(f"{path} must contain a JSON object")
    return value


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name, flush it, and rename it when the context ends without an exception.

    Raises:
        OSError: the disk is full or the system refuses; `path` is unchanged.
    """
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # a link planted here would be written through
        with naming(path), unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which an `OSError` without a file name, such as that of a full disk, gets that of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
