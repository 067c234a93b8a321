"""Folders that are on the disk as a whole or not at all, the manifest that proves it, and a lock on a run's folder.

Nothing here knows what is in the files.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft.io.direct_io import BufferPair, write_verified
from ft.io.manifest import MANIFEST
from ft.io.plain_files import remove

UNFINISHED, REPLACED = ".unfinished-", ".replaced-"

Executor = Callable[[Callable[[], None]], None]  # does a piece of work, and returns or raises when it is done


def run_now(work: Callable[[], None]) -> None:
    """Do a piece of work here and now."""
    work()


class StagedDirectory:
    """A folder that is being written: every file goes to the disk at once, is read back, and its SHA-256 is noted."""

    def __init__(self, path: Path, do: Executor = run_now) -> None:
        """`do` may choose when and where each piece of the work is done."""
        self.path, self._do, self._desk = path, do, BufferPair()
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Raises:
            OSError: the disk is full, or refuses, or gives back other bytes.
        """
        size, sha256 = write_verified(self.path / name, chunks, self._desk, self._do)
        self._files[name] = {"size": size, "sha256": sha256}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

    def write_manifest(self) -> None:
        """Write what each file must be, for `verify_manifest`."""
        self.write_json(MANIFEST, {"files": dict(self._files)})


@contextmanager
def atomic_directory(folder: Path, do: Executor = run_now) -> Iterator[StagedDirectory]:
    """A folder to write into that takes the name `folder` only when all of it is on the disk.

    A folder that had the name keeps it until then. If the process dies, `remove_stale_staging` cleans up.
    `do` is that of `StagedDirectory`.

    Raises:
        OSError: the disk is full, or refuses; `folder` is as it was.
    """
    unfinished, replaced = (folder.with_name(prefix + folder.name) for prefix in (UNFINISHED, REPLACED))
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield StagedDirectory(unfinished, do)
        fsync(unfinished)
        if os.path.lexists(folder):
            remove(replaced)
            folder.rename(replaced)
        unfinished.rename(folder)
        fsync(folder.parent)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(folder):
            replaced.rename(folder)
        remove(unfinished)
        raise
    remove(replaced)


def remove_stale_staging(parent: Path) -> None:
    """Put right what is left in `parent` of a process that died in `atomic_directory` or in `atomic_write_text`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = parent / replaced.name.removeprefix(REPLACED)
        if os.path.lexists(folder):
            remove(replaced)
        else:
            replaced.rename(folder)
    for unfinished in parent.glob(f"{UNFINISHED}*"):
        remove(unfinished)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    if sys.platform == "win32" and path.is_dir():
        return  # which Windows cannot be asked for
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 under another name, and rename it when all of it is on the disk.

    Raises:
        OSError: the disk is full, or refuses; `path` is as it was.
    """
    unfinished = path.with_name(f".unfinished-{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # which a link may have been put at, to be written through
        with unfinished.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
