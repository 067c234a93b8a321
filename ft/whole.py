"""A file that is the old one until it is the new one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
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
