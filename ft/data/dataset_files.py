"""The files of a data set: one file, a directory or a repository on the Hub, sorted into splits by their names."""

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from ft.errors import FtError, UsageError, shown
from ft.io.formats import SUFFIXES, check_first_bytes, suffix_of
from ft.io.hub import CONVERTED_REVISION, Source, find_files

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_WORD = f"(?i:{'|'.join(SPLITS)})"
# `train.parquet` or `train-00000-of-00002.parquet`; older uploads put a hash before the suffix.
SHARD = re.compile(rf"(?P<word>{_WORD})(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})(?:-[0-9a-f]+)?)?")
# `train/data-00000-of-00002.arrow`, as `datasets.save_to_disk` writes a split, or a single data set without the
# directory; its first versions wrote `dataset.arrow`.
SAVED = re.compile(rf"(?:(?P<word>{_WORD})/)?(?:data-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})|dataset)")
# `train/0000.parquet`, as the Hub converts data sets to parquet; `partial-train` if it stopped at 5 GB.
CONVERTED = re.compile(rf"(?:partial-)?(?P<word>{_WORD})/(?P<number>\d{{4}})")
# Without any of these: `train/anything.csv`, all files of the directory, or `reviews_train.csv`.
IN_DIRECTORY = re.compile(
    rf"(?P<word>{_WORD})/(?!state$|dataset_info$)[^/]+"
)  # `datasets` writes these two next to tables
WITH_WORD = re.compile(rf"(?:.*[^a-zA-Z])?(?P<word>{_WORD})(?:[^a-zA-Z].*)?")


class LayoutError(FtError):
    """The files of a data set do not make up its splits."""


class UnknownPartError(LayoutError, UsageError):
    """The directory or repository holds no data set of the given name."""


class NoSplitError(LayoutError):
    """The data set does not have the requested split."""


class SeveralDataSetsError(LayoutError, UsageError):
    """The directory or repository holds several data sets, in `directories`, and none was chosen."""

    def __init__(self, dataset: str, directories: Sequence[str]) -> None:
        self.directories = directories
        super().__init__(
            f"{dataset} holds several data sets, in {', '.join(directories)}: choose one by --dataset-config "
            f"{directories[0]}."
        )


def check_local_file(dataset: str) -> None:
    """Check that a --dataset that is named like a file exists, and that its format is supported if it is one.

    Raises:
        UsageError: it does not, or it is not.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        _single_file(path)
    elif not path.exists() and suffix_of(dataset):
        raise UsageError(f"there is no file {shown(dataset)}: check --dataset.")


def dataset_files(
    dataset: str, revision: str | None = None, part: str | None = None, *, first_of: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """Find the files of a data set: a file, or those in a directory, in the Hub's cache or on the Hub.

    On the Hub only parquet files count: those of the revision, else those that the Hub has converted from other
    formats, on the branch `refs/convert/parquet`.

    Args:
        dataset: a file, which is the training split; a directory; or a Hub id.
        revision: branch, tag or commit on the Hub.
        part: the directory of one of several data sets.
        first_of: find (and download) only the first of these splits that exists. Default: all splits.

    Returns:
        The shards, in order, of `train` and, if they exist, of `validation` and `test`; or of one split of `first_of`.

    Raises:
        FtError: as for `model_files`; no training split, a missing shard, or several files for the same shard.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        if given := [name for name, value in (("revision", revision), ("config", part)) if value is not None]:
            flags = " and ".join(f"--dataset-{name}" for name in given)
            raise UsageError(f"--dataset is the file {path}, where {flags} has no meaning: leave it out")
        return {"train": [_single_file(path)]}
    check_local_file(dataset)
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
    is_directory = Path(os.path.expanduser(source.name)).is_dir()
    suffixes = SUFFIXES if is_directory else (".parquet",)

    def sorted_names(names: Collection[str]) -> dict[str, list[str]]:
        return sort_into_splits(names, source.name, part, suffixes, first_of=first_of)

    def needed(names: Collection[str]) -> list[str]:
        # Download the first shard of the training split last: a cache that holds it holds all others too, even after
        # an interrupted download. The names of shards that the Hub converted (0000, 0001, ...) do not give their count.
        return [name for shards in sorted_names(names).values() for name in shards][::-1]

    files = find_files(source, needed)
    return {split: [files[name] for name in names] for split, names in sorted_names(files).items()}


def _single_file(path: Path) -> Path:
    """Check the suffix and the first bytes of a data set that is one file."""
    if suffix_of(path.name) is None:
        raise UsageError(
            f"--dataset is the file {path}, whose format is not supported: it must be one of {', '.join(SUFFIXES)}. "
            "Save a sheet of a workbook as .csv, and rename a .txt of values between tabs to .tsv."
        )
    try:
        check_first_bytes(path)
    except OSError as error:
        raise FtError(f"cannot read {path}, named by --dataset: {error.strerror}.") from error
    return path


def save_dataset(files: dict[str, list[Path]], directory: Path) -> None:
    """Copy a data set, as `dataset_files` returns it, to a new directory, which is renamed into place when complete.

    Raises:
        FtError: the directory is not empty, or cannot be written.
    """
    try:
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f"{directory} is not empty: name a new directory for the copy of the data set.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as staging:
            copy = Path(staging) / directory.name
            copy.mkdir()
            for split, shards in files.items():
                for i, shard in enumerate(shards):
                    suffix = suffix_of(shard.name) or ".parquet"
                    shutil.copyfile(shard, copy / f"{split}-{i:05}-of-{len(shards):05}{suffix}")
            if directory.exists():
                directory.rmdir()  # it is empty; on Windows a rename cannot replace it
            copy.rename(directory)
    except OSError as error:
        raise FtError(f"cannot save the data set in {directory}: {error.strerror or error}.") from error


# --- splits by file name --------------------------------------------------------------------------------------------


def sort_into_splits(
    names: Collection[str],
    dataset: str,
    part: str | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    first_of: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Sort file names into splits, the training split first, and check that each split has each shard once.

    Args:
        names: paths within the data set, with slashes.
        dataset: the name that the user gave, for messages.
        part: the directory of one of several data sets.
        suffixes: the formats to consider.
        first_of: take only the first of these splits that exists. Default: all splits, with at least a training split.

    Raises:
        NoSplitError: there is no training split, or none of those in `first_of`.
        SeveralDataSetsError: there are several data sets and no `part`.
        LayoutError: there is no data set in `part`, a shard is missing, or several files are the same shard.
    """
    found: dict[str, re.Match[str]] = {}
    homes: dict[str, str] = {}  # the directory of the data set that each file belongs to
    loose: dict[str, re.Match[str]] = {}  # names that count only if `found` is empty
    loose_homes: dict[str, str] = {}
    for name in sorted(names):
        suffix = suffix_of(name)
        if suffix is None or suffix not in suffixes:
            continue
        path = PurePosixPath(name[: -len(suffix)])
        end = "/".join(path.parts[-2:])
        if match := SHARD.fullmatch(path.name):
            found[name], homes[name] = match, str(path.parent)
        elif match := (SAVED if suffix == ".arrow" else CONVERTED).fullmatch(end):
            found[name], homes[name] = match, str(path.parent.parent)
        elif suffix != ".arrow" and (match := IN_DIRECTORY.fullmatch(end)):
            loose[name], loose_homes[name] = match, str(path.parent.parent)
        elif suffix != ".arrow" and (match := WITH_WORD.fullmatch(path.name)):
            loose[name], loose_homes[name] = match, str(path.parent)
    if not found:
        found, homes = loose, loose_homes
    directories = sorted(set(homes.values()))
    if part is not None and directories:
        if part not in directories:
            known = ", ".join("one at its top" if directory == "." else directory for directory in directories)
            raise UnknownPartError(
                f"{dataset} has no data set in a directory {shown(part)}, it has {known}: correct --dataset-config."
            )
    elif len(directories) > 1:
        raise SeveralDataSetsError(dataset, directories)
    splits: dict[str, list[str]] = {}
    for name, match in found.items():
        if part in (None, homes[name]):
            splits.setdefault(SPLITS[(match["word"] or "train").lower()], []).append(name)
    wanted = first_of or ("train",)
    present = [split for split in wanted if split in splits]
    if not present:
        wanted_names = " or ".join("training" if split == "train" else split for split in wanted)
        known = f"; it has {', '.join(splits)}. Looked for: " if splits else ": "
        raise NoSplitError(
            f"{dataset} has no {wanted_names} split{known}{wanted[0]}.parquet or {wanted[0]}-00000-of-00001.parquet "
            "(or .csv, .tsv, .json, .jsonl), at the top or in one directory. Name another data set, another "
            "--dataset-revision, or a directory with such files."
        )
    if first_of:
        splits = {present[0]: splits[present[0]]}
    for split, shards in splits.items():
        _check_shards(split, {name: found[name] for name in shards}, dataset)
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _check_shards(split: str, shards: dict[str, re.Match[str]], dataset: str) -> None:
    """Check that a split has one file per shard, and all shards."""
    forms = {
        (suffix_of(name), match.re, match["word"], match.groupdict().get("count")) for name, match in shards.items()
    }
    numbers = {int(match.groupdict().get("number") or 0) for match in shards.values()}
    if {form for _, form, _, _ in forms} == {IN_DIRECTORY}:
        return
    if len(forms) > 1 or len(numbers) < len(shards):
        raise LayoutError(f"{dataset} has several files for the same part of {split}: {', '.join(shards)}. Keep one.")
    suffix, form, word, count = forms.pop()
    if form is CONVERTED:
        wanted = max(numbers) + 1
        missing = [f"{word}/{i:04}{suffix}" for i in range(wanted) if i not in numbers]
    else:
        wanted = int(count or 1)
        name = f"{word}/data".removeprefix("None/") if form is SAVED else word
        missing = [f"{name}-{i:05}-of-{count}{suffix}" for i in range(wanted) if i not in numbers]
    if missing:
        first_missing = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise LayoutError(f"{dataset} lacks {len(missing)} of the {wanted} shards of {split}: {first_missing}.")
