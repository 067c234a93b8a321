"""Which files of a data set hold which split, as far as their names tell."""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from ft.errors import FtError, shown
from ft.io.formats import SUFFIXES, suffix_of

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_WORD = f"(?i:{'|'.join(SPLITS)})"
# `train.parquet` or `train-00000-of-00002.parquet`; older uploads put a hash before the suffix.
SHARD = re.compile(rf"(?P<word>{_WORD})(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})(?:-[0-9a-f]+)?)?")
# `train/data-00000-of-00002.arrow`, as `datasets.save_to_disk` writes a split, or a single data set without the folder;
# its first versions wrote `dataset.arrow`.
SAVED = re.compile(rf"(?:(?P<word>{_WORD})/)?(?:data-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})|dataset)")
# `train/0000.parquet`, as the Hub converts data sets to parquet; `partial-train` where it stopped at five gigabytes.
CONVERTED = re.compile(rf"(?:partial-)?(?P<word>{_WORD})/(?P<number>\d{{4}})")
# Where there are none of these: `train/anything.csv`, all of a directory together, or `reviews_train.csv`.
IN_DIRECTORY = re.compile(rf"(?P<word>{_WORD})/(?!state$|dataset_info$)[^/]+")  # which `datasets` writes beside tables
WITH_WORD = re.compile(rf"(?:.*[^a-zA-Z])?(?P<word>{_WORD})(?:[^a-zA-Z].*)?")


class LayoutError(FtError):
    """The files of a data set do not make up its splits."""


class NoSplitError(LayoutError):
    """None of the files is one of the split that is needed."""


class SeveralDataSetsError(LayoutError):
    """Several data sets lie side by side, in `folders`, and none of them was chosen."""

    def __init__(self, dataset: str, folders: Sequence[str]) -> None:
        self.folders = folders
        super().__init__(
            f"{dataset} holds several data sets, in {', '.join(folders)}: choose one by --dataset-config {folders[0]}."
        )


def sort_into_splits(
    names: Collection[str],
    dataset: str,
    part: str | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    first_of: Sequence[str] = (),
) -> dict[str, list[str]]:
    """The files of each split, the training split first, after seeing that each has all its shards, once.

    Args:
        names: paths within the data set, with slashes.
        dataset: what the user named, for messages.
        part: the folder of one of several data sets that lie side by side.
        suffixes: the formats to look at.
        first_of: take only the first of these splits that there is; left out: all, of which one must be train.

    Raises:
        NoSplitError: there is no training split, or none of those in `first_of`.
        SeveralDataSetsError: there are several data sets and no `part`.
        LayoutError: no data set of that name, a missing shard, or several files for the same part.
    """
    found: dict[str, re.Match[str]] = {}
    homes: dict[str, str] = {}  # the folder of the data set that a file belongs to
    loose: dict[str, re.Match[str]] = {}
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
    folders = sorted(set(homes.values()))
    if part is not None and folders:
        if part not in folders:
            there = ", ".join("one at its top" if folder == "." else folder for folder in folders)
            raise LayoutError(
                f"{dataset} has no data set in a folder {shown(part)}, it has {there}: correct --dataset-config."
            )
    elif len(folders) > 1:
        raise SeveralDataSetsError(dataset, folders)
    splits: dict[str, list[str]] = {}
    for name, match in found.items():
        if part in (None, homes[name]):
            splits.setdefault(SPLITS[(match["word"] or "train").lower()], []).append(name)
    wanted = first_of or ("train",)
    present = [split for split in wanted if split in splits]
    if not present:
        called = " or ".join("training" if split == "train" else split for split in wanted)
        there = f"; it has {', '.join(splits)}. Looked for: " if splits else ": "
        raise NoSplitError(
            f"{dataset} has no {called} split{there}{wanted[0]}.parquet or {wanted[0]}-00000-of-00001.parquet (or "
            ".csv, .tsv, .json, .jsonl), at the top or in one folder. Name another data set, another "
            "--dataset-revision, or a folder with such files."
        )
    if first_of:
        splits = {present[0]: splits[present[0]]}
    for split, shards in splits.items():
        _see_that_all_are_there(split, {name: found[name] for name in shards}, dataset)
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _see_that_all_are_there(split: str, shards: dict[str, re.Match[str]], dataset: str) -> None:
    forms = {
        (suffix_of(name), match.re, match["word"], match.groupdict().get("count")) for name, match in shards.items()
    }
    there = {int(match.groupdict().get("number") or 0) for match in shards.values()}
    if {form for _, form, _, _ in forms} == {IN_DIRECTORY}:
        return
    if len(forms) > 1 or len(there) < len(shards):
        raise LayoutError(f"{dataset} has several files for the same part of {split}: {', '.join(shards)}. Keep one.")
    suffix, form, word, count = forms.pop()
    if form is CONVERTED:
        missing = [f"{word}/{i:04}{suffix}" for i in range(max(there) + 1) if i not in there]
        wanted = max(there) + 1
    else:
        wanted = int(count or 1)
        name = f"{word}/data".removeprefix("None/") if form is SAVED else word
        missing = [f"{name}-{i:05}-of-{count}{suffix}" for i in range(wanted) if i not in there]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise LayoutError(f"{dataset} lacks {len(missing)} of the {wanted} shards of {split}: {shown}.")
