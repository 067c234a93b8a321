"""Atomic writes: a directory has its complete new content or its old content, even after a crash."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ft.io.manifest import CHUNK, MANIFEST
from ft.io.plain_files import UNFINISHED, naming, remove

REPLACED = ".replaced-"  # prefix of a directory that a new one replaces


class StagedDirectory:
    """A staging directory: every file is flushed to the disk, and its size and CRC-32 are recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, dict[str, object]] = {}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file; raises OSError if the disk is full or the system refuses."""
        size = crc = 0
        with naming(self.path / name), open(self.path / name, "xb") as file:
            for chunk in chunks:
                for start in range(0, len(chunk), CHUNK):
                    part = memoryview(chunk)[start : start + CHUNK]
                    crc = zlib.crc32(part, crc)
                    size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        self._files[name] = {"size": size, "crc32": f"{crc:08x}"}

    def write_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON object."""
        self.write(name, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

    def write_manifest(self) -> None:
        """Write the size and CRC-32 of each file, for `verify_manifest`."""
        self.write_json(MANIFEST, {"files": dict(self._files)})


@contextmanager
def atomic_directory(directory: Path) -> Iterator[StagedDirectory]:
    """Write a directory in a staging directory beside it, which is renamed when all files are on the disk.

    An existing one stays until then, and after an error. If the process dies, `remove_stale_staging` cleans up.
    """
    unfinished, replaced = (directory.with_name(prefix + directory.name) for prefix in (UNFINISHED, REPLACED))
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield StagedDirectory(unfinished)
        _fsync_directory(unfinished)
        # A rename cannot replace a directory that has files: the old one is renamed first, and deleted at the end.
        if os.path.lexists(directory):
            remove(replaced)
            directory.rename(replaced)
        unfinished.rename(directory)
        _fsync_directory(directory.parent)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(directory):
            replaced.rename(directory)
        remove(unfinished)
        raise
    remove(replaced)


def remove_stale_staging(parent: Path) -> None:
    """Clean up in `parent` after a process that died in `atomic_directory` or in `atomic_file`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        directory = parent / replaced.name.removeprefix(REPLACED)
        if not os.path.lexists(directory):
            replaced.rename(directory)
    for stale in (*parent.glob(f"{REPLACED}*"), *parent.glob(f"{UNFINISHED}*")):
        remove(stale)


def _fsync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk. Windows cannot."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
