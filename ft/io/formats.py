"""File formats by suffix, and a check of the first bytes."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ft.errors import FtError

if TYPE_CHECKING:
    pass


# How files begin. What comes in their place is nothing at all, a Git LFS pointer, or a web page.
FIRST_BYTES = {
    ".json": rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff\0)?\s*[\[{]",
    ".parquet": rb"PAR1",
    ".safetensors": rb"(?s:.{8})\{",
    ".gz": rb"\x1f\x8b",
}


def check_first_bytes(path: Path) -> None:
    """Refuse a file that is not of the kind its name says."""
    if path.exists() and not path.is_file():  # from a pipe that nobody writes to, reading would wait for ever
        raise FtError(f"{path} is no file: put the real one there.")
    with path.open("rb") as file:
        beginning = file.read(100)
    if beginning.startswith(b"version https://git-lfs"):
        raise FtError(f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in its folder.")
    if not re.match(FIRST_BYTES.get(path.suffix.lower(), rb"(?!\s*(?i:<!doctype|<html))"), beginning):
        kind = path.suffix.lstrip(".")
        raise FtError(f"{path} is no {kind} file, it begins with {beginning[:20]!r}: put the real one there.")


TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
SUFFIXES = (".parquet", ".arrow", *TEXT_SUFFIXES, *(suffix + ".gz" for suffix in TEXT_SUFFIXES), ".feather")


def suffix_of(name: str) -> str | None:
    """The suffix by which a file's format is known; None for a format that is not read."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
