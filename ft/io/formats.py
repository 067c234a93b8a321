"""File formats by suffix, and a check of a file's first bytes."""

import re
from pathlib import Path

from ft.errors import FtError

# How files of a format begin. In their place there may be an empty file, a Git LFS pointer or a web page.
FIRST_BYTES = {
    ".json": rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff\0)?\s*[\[{]",
    ".parquet": rb"PAR1",
    ".safetensors": rb"(?s:.{8})\{",
    ".gz": rb"\x1f\x8b",
}


def check_first_bytes(path: Path) -> None:
    """Check that a file has the format that its suffix names.

    Raises:
        FtError: it is not a file, or has another format.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():  # reading a FIFO without a writer would block forever
        raise FtError(f"{path} is not a file: put the file itself there.")
    with path.open("rb") as file:
        beginning = file.read(100)
    if beginning.startswith(b"version https://git-lfs"):
        raise FtError(f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in its directory.")
    if not re.match(FIRST_BYTES.get(path.suffix.lower(), rb"(?!\s*(?i:<!doctype|<html))"), beginning):
        kind = path.suffix.lstrip(".")
        raise FtError(f"{path} is not a {kind} file, it begins with {beginning[:20]!r}: put the file itself there.")


TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
SUFFIXES = (".parquet", ".arrow", *TEXT_SUFFIXES, *(suffix + ".gz" for suffix in TEXT_SUFFIXES), ".feather")


def suffix_of(name: str) -> str | None:
    """The suffix that determines a file's format; None if the format is not supported."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
