"""Paths that a user gives: `~` in them, their length, and whether a table may be written there."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ft.errors import shown

T = TypeVar("T")

# Settings that are paths, some of them optionally: a model may also be a Hub id.
SETTINGS = ("model", "dataset", "save_dataset", "output_dir", "resume", "forgetting", "profile", "adapter")

OUTPUT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")  # of tables
# The weights of a model or adapter, and the files of a run or model whose names end as those of tables.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_FILES_OF_RUNS = {"metrics.jsonl", "scores.json", "summary.json", "config.json", "state.json", "manifest.json"}
_FILES_OF_RUNS |= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "generation_config.json"}
_FILES_OF_RUNS |= {"special_tokens_map.json", "added_tokens.json", "adapter_config.json", "ft.json", *_WEIGHTS}
_DIRECTORIES_OF_RUNS = re.compile(r"inputs|final|adapter|classifier|gguf|checkpoint-[0-9]+")


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


def find_output_problems(path: Path, inputs: Sequence[Path] = ()) -> list[str]:
    """A message for an --output that cannot be written as a table, or that would replace what is read.

    Args:
        path: the value of --output.
        inputs: the files that the command reads, and directories of runs and models.
    """
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        known = f"{', '.join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}"
        return [f"--output is {shown(str(path))}, it must end in {known}"]
    if path.is_dir():
        return [f"--output is {shown(str(path))}, which is a directory: name a file in it"]
    if not path.parent.is_dir():
        return [
            f"--output is {shown(str(path))}, it must be the name of a file in a directory that exists, "
            f"{shown(str(path.parent))} does not"
        ]
    if path.exists() and not path.is_file():
        return [f"--output is {shown(str(path))}, which is not a regular file: name another"]
    real = Path(os.path.realpath(path))  # `Path.resolve` raises an error for a link to itself
    if real.name in _FILES_OF_RUNS and real.exists() and _is_run_or_model(real.parent):
        return [f"--output is {shown(str(path))}, a file of the run or model in that directory: name another"]
    if any(map(_is_written_by_a_run, real.parents)):
        return [f"--output is {shown(str(path))}, in a directory that a run writes: name a file outside it"]
    if path.exists():  # also as a hard link, or under a name with other capitals
        for source in (file for given in inputs for file in _files_of(given)):
            if source.exists() and path.samefile(source):
                return [f"--output is {shown(str(path))}, the file that is read: name another"]
    return []


def _is_run_or_model(directory: Path) -> bool:
    """Whether a directory is a run, a checkpoint, a model or an adapter."""
    return any((directory / name).exists() for name in ("metrics.jsonl", *_WEIGHTS))


def _is_written_by_a_run(directory: Path) -> bool:
    """Whether a directory is one of a run's own, such as final/; earlier predictions beside these can be replaced."""
    of_a_run = _DIRECTORIES_OF_RUNS.fullmatch(directory.name) is not None
    return of_a_run and (directory.parent / "metrics.jsonl").exists()


def _files_of(source: Path) -> Iterator[Path]:
    """The files of an input: the file itself, or the files of a run or model and those in the run's directories."""
    if not source.is_dir():
        yield source
        return
    runs = [directory for directory in (source, source.parent) if _is_run_or_model(directory)]
    for directory in runs:
        yield from (directory / name for name in sorted(_FILES_OF_RUNS))
        for child in directory.iterdir():
            if _DIRECTORIES_OF_RUNS.fullmatch(child.name):
                yield from child.rglob("*")
