"""Which files a data set has: one file, a directory, or a repository on the Hub."""

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from ft.data.split_files import NoSplitError, sort_into_splits
from ft.errors import FtError, shown
from ft.io.formats import SUFFIXES, check_first_bytes, suffix_of
from ft.io.hub import CONVERTED_REVISION, Source, find_files


def dataset_files(
    dataset: str, revision: str | None = None, part: str | None = None, *, first_of: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """Find a data set's files: the file `dataset`, those in that folder, or those in the cache or on the Hub.

    On the Hub only parquet files count, first those of the revision, then those that the Hub itself has made of other
    formats, on the branch `refs/convert/parquet`.

    Args:
        dataset: a file, which is the training split; a folder; a Hub id.
        revision: branch, tag or commit on the Hub.
        part: the folder of one of several data sets that lie side by side.
        first_of: get only the first of these splits that there is, the others are not downloaded; left out: all.

    Returns:
        The shards, in order, of `train` and, where they exist, of `validation` and `test`; or of the first of
        `first_of`.

    Raises:
        FtError: as for `model_files`; no training split, a missing shard, or several files for the same part.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        return {"train": [_single_file(path)]}
    if not path.exists() and suffix_of(dataset):
        raise FtError(f"there is no file {shown(dataset)}: check --dataset.")
    try:
        return _dataset_files(Source("dataset", dataset, revision), part, first_of)
    except NoSplitError as error:
        if path.is_dir() or revision is not None:
            raise
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return _dataset_files(Source("dataset", dataset, CONVERTED_REVISION), part, first_of)
        except FtError as failure:
            if isinstance(failure.__cause__, RevisionNotFoundError):  # there is no such branch
                raise error from None
            raise


def _dataset_files(source: Source, part: str | None, first_of: Sequence[str]) -> dict[str, list[Path]]:
    is_folder = Path(os.path.expanduser(source.name)).is_dir()
    suffixes = SUFFIXES if is_folder else (".parquet",)

    def sorted_names(names: Collection[str]) -> dict[str, list[str]]:
        return sort_into_splits(names, source.name, part, suffixes, first_of=first_of)

    def needed(names: Collection[str]) -> list[str]:
        # The first shard of the training split comes last: a cache that holds it, even of an interrupted run, holds
        # all others too. The Hub's own shards (0000, 0001, ...) do not tell how many they are.
        return [name for shards in sorted_names(names).values() for name in shards][::-1]

    files = find_files(source, needed)
    return {split: [files[name] for name in names] for split, names in sorted_names(files).items()}


def _single_file(path: Path) -> Path:
    """A data set that is one file, after a look at it."""
    if suffix_of(path.name) is None:
        raise FtError(
            f"--dataset is the file {path}, whose format is not read: it must be one of {', '.join(SUFFIXES)}. Save a "
            "sheet of a workbook as .csv, and rename a .txt of values between tabs to .tsv."
        )
    try:
        check_first_bytes(path)
    except OSError as error:
        raise FtError(f"cannot read {path}, named by --dataset: {error.strerror}.") from error
    return path


def save_dataset(files: dict[str, list[Path]], directory: Path) -> None:
    """Copy a data set, as `dataset_files` returns it, into a new folder, which gets its name only when complete.

    Raises:
        FtError: the folder holds something already, or it cannot be written.
    """
    try:
        if directory.exists() and any(directory.iterdir()):
            raise FtError(f"{directory} is not empty: name a new folder for the copy of the data set.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as staging:
            copy = Path(staging) / directory.name
            copy.mkdir()
            for split, shards in files.items():
                for i, shard in enumerate(shards):
                    suffix = suffix_of(shard.name) or ".parquet"
                    shutil.copyfile(shard, copy / f"{split}-{i:05}-of-{len(shards):05}{suffix}")
            if directory.exists():
                directory.rmdir()  # it is empty; Windows renames onto nothing that exists
            copy.rename(directory)
    except OSError as error:
        raise FtError(f"cannot save the data set in {directory}: {error.strerror or error}.") from error
