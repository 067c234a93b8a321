"""The manifest of a checkpoint: the size and SHA-256 of each file."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ft.errors import FtError
from ft.io.json_file import read_json

MANIFEST = "manifest.json"


def verify_manifest(folder: Path, needed: Iterable[str]) -> str | None:
    """What is wrong with a folder against its manifest, in a few words; None if every byte is as it was written.

    Only plain files count: a manifest that came from elsewhere must not lead out of its folder.
    """
    try:
        if (folder / MANIFEST).is_symlink() or not (folder / MANIFEST).is_file():
            return f"{MANIFEST} is missing or no plain file"
        files = read_json(folder / MANIFEST)["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:  # a directory that may not be entered
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except FtError:
        return f"{MANIFEST} is unreadable"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no list of files"
    for name in dict.fromkeys([*needed, *expected]):  # each once
        path = folder / name
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
        size, sha256 = expected[name]
        try:
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                return f"{name} is missing or no plain file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, hashlib.sha256).hexdigest() != sha256:
                    return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
