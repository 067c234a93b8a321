"""The manifest of a checkpoint: the size and SHA-256 of each file."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ft.errors import FtError
from ft.io.plain_files import read_json

MANIFEST = "manifest.json"


def verify_manifest(directory: Path, needed: Iterable[str]) -> str | None:
    """Verify a directory against its manifest.

    Only regular files in the directory itself count: a manifest of unknown origin must not reach files elsewhere.

    Args:
        directory: the directory.
        needed: names that the manifest must list.

    Returns:
        The first difference, in a few words; None if every byte is as written.
    """
    try:
        if (directory / MANIFEST).is_symlink() or not (directory / MANIFEST).is_file():
            return f"{MANIFEST} is missing or not a regular file"
        files = read_json(directory / MANIFEST)["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:  # a directory that may not be entered
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except FtError:
        return f"{MANIFEST} is unreadable"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a list of files"
    for name in dict.fromkeys([*needed, *expected]):  # each once
        path = directory / name
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
        size, sha256 = expected[name]
        try:
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                return f"{name} is missing or not a regular file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, hashlib.sha256).hexdigest() != sha256:
                    return f"{name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
