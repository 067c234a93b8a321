"""The splits of a data set that a finished model is evaluated on."""

from collections.abc import Sequence
from pathlib import Path

from ft.config import Config
from ft.data import dataset_files
from ft.data.dataset_files import NoSplitError
from ft.data.load import columns_of, read_splits
from ft.data.splits import Split
from ft.data.table import NoLabelsError
from ft.data.tables import read_split
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
