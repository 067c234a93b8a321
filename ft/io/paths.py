"""Paths as people write them, whichever way they arrive: by a flag, a configuration, a positional, or a call."""

import os
from typing import TypeVar

T = TypeVar("T")

# Settings of a run that may be paths, some of them the name of something else instead.
SETTINGS = ("model", "dataset", "save_dataset", "output_dir", "resume", "forgetting")


def expand_home(path: T) -> T:
    """A path with the home directory in place of a `~` or `~user` at its start; what is no such text stays as it is.

    A shell does this only where the `~` begins a word, which it does not in `--output-dir=~/x` and in a config.json.
    """
    return os.path.expanduser(path) if isinstance(path, str) else path  # type: ignore[return-value]
