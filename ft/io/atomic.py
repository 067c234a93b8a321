"""Atomic writes: a directory or a text file has its complete new content or its old content, even after a crash.

Nothing here depends on what is in the files.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ft.io.direct_io import BufferPair, write_verified
from ft.io.manifest import MANIFEST
from ft.io.plain_files import remove

UNFINISHED, REPLACED = ".unfinished-", ".replaced-"  # prefixes of staging directories, and of what they replace

Executor = Callable[[Callable[[], None]], None]  # runs a function, and returns or raises when it has ended


def run_now(work: Callable[[], None]) -> None:
    """The executor that runs everything at once, in the calling thread."""
    work()


class StagedDirectory:
    """A staging directory: every file is flushed, read back and compared, and its size and SHA-256 are recorded."""

    def __init__(self, path: Path, executor: Executor = run_now) -> None:
        """`executor` runs each piece of the work, and may choose when and in which thread."""
        self.path, self._executor, self._buffers = path, executor, BufferPair()
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Raises:
            OSError: the disk is full, the system refuses, or other bytes are read back.
        """
        size, sha256 = write_verified(self.path / name, chunks, self._buffers, self._executor)
        self._files[name] = {"size": size, "sha256": sha256}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

    def write_manifest(self) -> None:
        """Write the size and SHA-256 of each file, for `verify_manifest`."""
        self.write_json(MANIFEST, {"files": dict(self._files)})


@contextmanager
def atomic_directory(directory: Path, executor: Executor = run_now) -> Iterator[StagedDirectory]:
    """Write a directory in a staging directory beside it, which is renamed when all files are on the disk.

    An existing directory of that name stays until then. If the process dies, `remove_stale_staging` cleans up.

    Args:
        directory: the final name.
        executor: that of `StagedDirectory`.

    Raises:
        OSError: the disk is full or the system refuses; `directory` is unchanged.
    """
    unfinished, replaced = (directory.with_name(prefix + directory.name) for prefix in (UNFINISHED, REPLACED))
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield StagedDirectory(unfinished, executor)
        fsync(unfinished)
        # A rename cannot replace a directory that has files: the old one is renamed first, and deleted at the end.
        if os.path.lexists(directory):
            remove(replaced)
            directory.rename(replaced)
        unfinished.rename(directory)
        fsync(directory.parent)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(directory):
            replaced.rename(directory)
        remove(unfinished)
        raise
    remove(replaced)


def remove_stale_staging(parent: Path) -> None:
    """Clean up in `parent` after a process that died in `atomic_directory` or in `atomic_write_text`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        directory = parent / replaced.name.removeprefix(REPLACED)
        if os.path.lexists(directory):
            remove(replaced)
        else:
            replaced.rename(directory)
    for unfinished in parent.glob(f"{UNFINISHED}*"):
        remove(unfinished)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows has no fsync of directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name, flush it, and rename it when the context ends without an exception.

    Raises:
        OSError: the disk is full or the system refuses; `path` is unchanged.
    """
    unfinished = path.with_name(f".unfinished-{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # a link planted here would be written through
        with unfinished.open("xb") as file:
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
