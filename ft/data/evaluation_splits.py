"""The splits of a data set that a finished model is evaluated on, with labels that are numbered as the model's."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from ft.config import Config
from ft.data import dataset_files
from ft.data.dataset_files import NoSplitError
from ft.data.load import columns_of, read_splits, renumber
from ft.data.splits import Split
from ft.data.table import NoLabelsError, listed
from ft.data.tables import WHOLE_NUMBER, read_other_columns, read_split
from ft.data.text_files import TextFormat
from ft.errors import FtError, UsageError


def read_evaluation_splits(
    config: Config, split: str | None, label_names: Sequence[str] | None, *, of_run: bool
) -> tuple[dict[str, Split], list[str]]:
    """Read the splits to evaluate a model on; other splits are not downloaded or read.

    Args:
        config: names the data set and its columns.
        split: train, validation or test; "all" for all that exist; None for test, else validation, else train.
        label_names: the label names of the model; None to evaluate completions.
        of_run: whether this is the data set that the model was trained on: a single file was then split into training
            and validation rows. Of any other single file all rows are read.

    Returns:
        The splits, and notes for the user on how they were read.

    Raises:
        UsageError: the split that is named does not exist.
        NoSplitError: none of the splits exists.
        FtError: a split cannot be read, or none has labels.
    """
    order = {None: ("test", "validation", "train"), "all": ("train", "validation", "test")}
    wanted: Sequence[str] = order.get(split, (str(split),))
    path = Path(config.dataset).expanduser()
    notes: list[str] = []
    if path.is_file() and not of_run:
        if split not in order:
            notes.append(f"{path.name} is one file, without splits: all its rows are evaluated")
        wanted = [path.name if split in order else wanted[0]]
    splits: dict[str, Split] = {}
    failures: list[FtError] = []
    for name in wanted:
        try:
            splits[name], new_notes = _read_split(config, name, label_names, of_run=of_run)
            notes += new_notes
        except (NoSplitError, NoLabelsError) as error:
            failures.append(error)
            if isinstance(error, NoLabelsError):
                notes.append(f"the {name} split is left out: {str(error).partition(';')[0]}")
            continue
        if split is None:
            break
    if not splits:
        is_named = split not in order and isinstance(failures[0], NoSplitError)
        raise UsageError(str(failures[0])) if is_named else failures[0]
    return splits, notes


def number_as_model(
    split: Split, names: Sequence[str], numbers: Sequence[int] | None, *, are_given: bool = False
) -> tuple[Split, list[str]]:
    """Number the labels of a split as a model does.

    Labels that are words, or numbers that the data set names (`ClassLabel`), are matched by name if the model has any
    of these names. Other labels are numbers, and the model's names stand for:

    - `numbers`, if these are known;
    - the names themselves, if they are numbers, such as stars from 1 to 5;
    - otherwise, and whenever the user gives the names, 0, 1, ...

    Args:
        split: numbered by `number_labels` with the label names of the model.
        names: the label names of the model.
        numbers: the numbers in its training data that `names` stand for, unless they are 0, 1, ...
        are_given: whether the user gives `names`, in place of those of the model.

    Returns:
        The split, and notes for the user.

    Raises:
        FtError: the model does not have the label of a row.
    """
    published = split.label_names
    notes: list[str] = []
    if published is None and not are_given:
        if numbers is None and all(map(WHOLE_NUMBER.fullmatch, names)):
            numbers = list(map(int, names))
    else:
        numbers = None
    split = renumber(split, names)
    if published is not None and not set(published) & set(names):
        notes.append(
            f"the labels of the data are {listed(published)}, those of the model {listed(names)}: they are matched by "
            "number"
        )
    place_of = {number: place for place, number in enumerate(range(len(names)) if numbers is None else numbers)}
    row = next((row for row, label in enumerate(split.labels) if label not in place_of), None)
    if row is not None:
        known = listed(list(map(str, place_of)))
        stand_for = "" if known == listed(names) else f" ({listed(names)})"
        raise FtError(
            f"the label in {split.where(row)} is {split.labels[row]}, the model has {known}{stand_for}: correct the "
            "data"
        )
    return replace(split, labels=[place_of[label] for label in split.labels]), notes


class OtherColumns:
    """The columns of the files of splits that are not evaluated, such as an id of each row.

    Attributes:
        names: the names in all files, in order. Of several columns of one name all but the first have a number.
    """

    def __init__(self, splits: Sequence[Split], config: Config) -> None:
        """Read them.

        Raises:
            FtError: a file cannot be read, or has changed since it was read.
        """
        columns, form = columns_of(config), TextFormat(config.delimiter, config.encoding)
        self._values: dict[Path, dict[str, Sequence[Any]]] = {}
        for path, num_rows in {file.path: file.num_rows for split in splits for file in split.files}.items():
            values = self._values[path] = {}
            for name, column in read_other_columns(path, columns, form):
                if len(column) != num_rows:
                    raise FtError(f"{path} was changed while it was evaluated: evaluate it again")
                new = (f"{name}.{number}" for number in count(1))
                values[name if name not in values else next(each for each in new if each not in values)] = column
        self.names = list(dict.fromkeys(name for values in self._values.values() for name in values))

    def values(self, split: Split, row: int) -> list[Any]:
        """The values of a row of a split, None for a column that its file does not have."""
        place = split.place(row)
        assert place is not None, "the rows are from files"
        columns = self._values[place.path]
        return [columns[name][place.row] if name in columns else None for name in self.names]


def _read_split(
    config: Config, name: str, label_names: Sequence[str] | None, *, of_run: bool
) -> tuple[Split, Sequence[str]]:
    try:
        if of_run and name == "train":
            raise NoSplitError("some of its rows may be the validation split")
        files = dataset_files.dataset_files(
            config.dataset, config.dataset_revision, config.dataset_config, first_of=(name,)
        )
        if of_run and name not in files:
            raise NoSplitError(
                f"{config.dataset} has no {name} split; it has train and validation: name one by --split"
            )
    except NoSplitError:
        if not of_run or name == "test":
            raise
        splits, notes = read_splits(config, label_names)
        return splits[name], notes
    (paths,) = files.values()
    remedy = "use the labels of the model in the data"
    form = TextFormat(config.delimiter, config.encoding)
    columns = columns_of(config)
    split = read_split(name, paths, columns, label_names, form, skip_empty=config.skip_empty, remedy=remedy)
    return split, split.notes
