"""Which splits of a data set a finished model is judged by."""

from collections.abc import Sequence
from pathlib import Path

from ft.config import Config
from ft.data import dataset_files
from ft.data.load import columns_of, read_splits
from ft.data.split_files import NoSplitError
from ft.data.splits import Split
from ft.data.tables import NoLabelsError, read_split
from ft.data.text_files import TextFormat
from ft.errors import FtError


def splits_to_judge(
    config: Config, split: str | None, label_names: Sequence[str] | None, *, of_run: bool
) -> tuple[dict[str, Split], list[str]]:
    """The splits that a finished model is judged by; no other is fetched and read.

    Args:
        config: which data are meant.
        split: train, validation or test; "all" for each that there is; None for test, else validation, else train.
        label_names: the words of the model's labels; None where it is judged by completions.
        of_run: whether these are the data of the run, of which one file is training and validation rows; any other file
            is judged whole.

    Returns:
        The splits, and what the user should know of how they were read.

    Raises:
        NoSplitError: none of them is there.
        FtError: they cannot be read, or have no labels.
    """
    order = {None: ("test", "validation", "train"), "all": ("train", "validation", "test")}
    wanted: Sequence[str] = order.get(split, (str(split),))
    path = Path(config.dataset).expanduser()
    if path.is_file() and not of_run:
        wanted = [path.name if split in order else wanted[0]]
    splits: dict[str, Split] = {}
    notes: list[str] = []
    failures: list[FtError] = []
    for name in wanted:
        try:
            splits[name], told = _split_to_judge(config, name, label_names, of_run=of_run)
            notes += told
        except (NoSplitError, NoLabelsError) as error:
            failures.append(error)
            if isinstance(error, NoLabelsError):
                notes.append(f"the {name} split is left out: {str(error).partition(';')[0]}")
            continue
        if split is None:
            break
    if not splits:
        raise failures[0]
    return splits, notes


def _split_to_judge(
    config: Config, name: str, label_names: Sequence[str] | None, *, of_run: bool
) -> tuple[Split, Sequence[str]]:
    try:
        if of_run and name == "train":
            raise NoSplitError("it may have lost rows to validation")
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
    remedy = "write the labels of the model into the data"
    form = TextFormat(config.delimiter, config.encoding)
    split = read_split(name, paths, columns_of(config), label_names, form, remedy=remedy)
    return split, split.notes
