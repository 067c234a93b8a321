"""Expansion of `~` in paths, wherever they come from: a flag, a config.json, a positional argument or a call."""

import errno
import os
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Settings that are paths, some of them optionally: a model may also be a Hub id.
SETTINGS = ("model", "dataset", "save_dataset", "output_dir", "resume", "forgetting", "profile", "adapter")


def expand_home(path: T) -> T:
    """Expand `~` or `~user` at the start of a path; other values are returned unchanged.

    A shell expands `~` only at the start of a word, so not in `--output-dir=~/x` and not in a config.json.
    """
    return os.path.expanduser(path) if isinstance(path, str) else path  # type: ignore[return-value]


def is_too_long(path: str) -> bool:
    """Whether the system refuses a path for its length: on Linux above 4,095 bytes, or 255 between two slashes."""
    for part in (path, *Path(path).parts):  # each by itself too, as the directory before it may not exist yet
        try:
            os.lstat(part)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return True
        except ValueError:  # NUL or a lone surrogate
            return False
    return False
