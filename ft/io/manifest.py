"""The manifest of a checkpoint: the size and the CRC-32 of each file."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from ft.errors import FtError
from ft.io.plain_files import read_json

MANIFEST = "manifest.json"
CHUNK = 2**18  # bytes that are hashed at a time, while the processor's cache holds them


def has_digest(path: Path, entry: Mapping[str, object]) -> bool:
    """Whether a file has the digest of its entry in a manifest.

    A CRC-32 finds every change within 32 adjacent bits, and misses another one with a probability of 2^-32
    (https://en.wikipedia.org/wiki/Cyclic_redundancy_check). It finds damage, not forgery.
    """
    with path.open("rb") as file:
        if "crc32" not in entry:  # in checkpoints of earlier versions
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        crc = 0
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}" == entry["crc32"]


def verify_manifest(directory: Path, needed: Iterable[str]) -> str | None:
    """Compare a directory with its manifest, which must list `needed`; returns the first difference, or None.

    Only regular files in the directory itself count: a manifest of unknown origin must not reach files elsewhere.
    """
    reading = MANIFEST
    try:
        if (directory / MANIFEST).is_symlink() or not (directory / MANIFEST).is_file():
            return f"{MANIFEST} is missing or not a regular file"
        entries = read_json(directory / MANIFEST)["files"]
        for reading in dict.fromkeys([*needed, *entries]):  # each once
            path = directory / reading
            if reading not in entries:
                return f"{MANIFEST} does not list {reading}"
            if path.name != reading or path.is_symlink() or not path.is_file():
                return f"{reading} is missing or not a regular file"
            if path.stat().st_size != entries[reading]["size"]:
                return f"{reading} has {path.stat().st_size} bytes, not {entries[reading]['size']}"
            if not has_digest(path, entries[reading]):
                return f"{reading} has another digest than when it was written"
    except OSError as error:
        return f"{reading} cannot be read: {error.strerror}"
    except (FtError, KeyError, TypeError):
        return f"{MANIFEST} is not a list of files, their sizes and digests"
    return None
