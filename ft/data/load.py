"""Loading the data of a run: splits, label names, and examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from ft.config import Config
from ft.data import dataset_files
from ft.data.demo import write_demo
from ft.data.examples import UNLIMITED, Example, describe_cut, encode, keep_end, label_tokens, length_of
from ft.data.splits import Split, stratified
from ft.data.table import NoLabelsError, listed
from ft.data.tables import WHOLE_NUMBER, Columns, read_split
from ft.data.text_files import TextFormat
from ft.errors import FtError, UsageError, counted, shown
from ft.io.formats import TEXT_SUFFIXES

VALIDATION_FRACTION = 0.1  # of the training rows, if there is no validation split
MOST_NOTES = 4  # on labels of several tokens; more are summed up in one


@dataclass(frozen=True)
class Data:
    """The data of a run, as rows and as examples.

    Attributes:
        splits: the rows of each split.
        examples: the tokenized rows of each split, in the same order.
        label_names: the names of the labels; empty for completions.
        label_ids: the token of each label; empty for completions.
        tokenizer: that of the model.
        lengths: tokens of each row of each split, before it is cut to --max-length.
        notes: notes for the user on how the data were read, a sentence each.
    """

    splits: dict[str, Split]
    examples: dict[str, list[Example]]
    label_names: tuple[str, ...]
    label_ids: list[int]
    tokenizer: Tokenizer
    lengths: dict[str, list[int]]
    notes: list[str]

    def describe_cut(self, max_length: int, limit: int) -> list[str]:
        """A note on the examples that are longer than `max_length`, and the lengths that keep more; none if none is.

        Args:
            max_length: the tokens that are kept.
            limit: the most that the model can read.
        """
        return describe_cut([length for lengths in self.lengths.values() for length in lengths], max_length, limit)

    def sha256(self) -> str:
        """The SHA-256 of all examples, by which a resumed run recognizes its data."""
        digest = hashlib.sha256()
        for name, examples in self.examples.items():
            digest.update(name.encode())
            for example in examples:
                digest.update(repr(example).encode())
        return digest.hexdigest()


def with_demo_inputs(config: Config, directory: Path, *, write: bool = True) -> Config:
    """The same configuration with the demo's model and data set in `directory`, which are written first if `write`."""
    if write:
        write_demo(directory)
    return replace(config, model=str(directory / "model"), dataset=str(directory / "dataset"))


def columns_of(config: Config) -> Columns:
    """The columns that a run reads.

    Raises:
        UsageError: a prompt column is named, but no completion column.
    """
    if config.completion_column is None and config.prompt_column != Config.prompt_column:
        raise UsageError(
            f"--prompt-column is {shown(config.prompt_column)} without --completion-column: give both or neither"
        )
    if config.completion_column is not None:
        return Columns(text=config.prompt_column, completion=config.completion_column)
    return Columns(text=config.text_column, label=config.label_column)


def read_splits(config: Config, label_names: Sequence[str] | None = None) -> tuple[dict[str, Split], list[str]]:
    """Download and read the data set, split off validation rows if it has none, and sample the training rows.

    Args:
        config: the settings of the run.
        label_names: the names of the labels. Default: those of `config` or of the training split.

    Returns:
        The splits, and notes for the user on how they were read.

    Raises:
        FtError: the data cannot be read.
    """
    columns, form = columns_of(config), TextFormat(config.delimiter, config.encoding)
    files = dataset_files.dataset_files(config.dataset, config.dataset_revision, config.dataset_config)
    if config.save_dataset is not None:
        dataset_files.save_dataset(files, Path(config.save_dataset))
    label_names = label_names or _configured_names(config)
    splits: dict[str, Split] = {}
    notes: list[str] = []
    notes += _unused_format(form, files)
    for name, paths in files.items():  # the training split first: its words are the labels of all splits
        names = label_names or (splits["train"].label_names if splits else None)
        try:
            splits[name] = read_split(name, paths, columns, names, form, skip_empty=config.skip_empty)
        except NoLabelsError as error:
            if name == "train":
                raise
            notes.append(f"the {name} split is left out: {str(error).partition(';')[0]}")
            continue
        notes += splits[name].notes
    if columns.completion is None:
        _check_labels_agree(splits, files, label_names)
        train_names = splits["train"].label_names
        # Empty or duplicate names are left for `label_tokens`, whose error gives the reason.
        if train_names is not None and len(set(train_names) - {""}) == len(train_names) > 1:
            splits = {name: renumber(split, train_names) for name, split in splits.items()}
        if config.label_names is not None:
            _require_name_for_each(splits["train"], label_names or ())
        splits, numbers_note = _name_numbers(splits, label_names)
        notes += numbers_note
    train = splits["train"]
    if "validation" not in splits:
        count = round(VALIDATION_FRACTION * len(train.texts))
        if not 0 < count < len(train.texts):
            raise FtError(
                f"{config.dataset} has no validation split, and {counted(len(train.texts), 'training row')} "
                f"{'is' if len(train.texts) == 1 else 'are'} too few to set some aside: add a split or rows"
            )
        validation_rows = set(stratified(train.labels, count, config.seed))
        splits["validation"] = train.only(sorted(validation_rows), "validation")
        train = train.only([row for row in range(len(train.texts)) if row not in validation_rows])
        rows = f"{counted(count, 'training row')}, drawn by --seed, {'is' if count == 1 else 'are'} set aside for it"
        notes.append(f"there is no validation split: {rows}")
    count = round(config.train_fraction * len(train.texts))
    count = min(count, config.max_train_samples or count)
    if count == 0:
        rows = counted(len(train.texts), "training row")
        raise UsageError(f"--train-fraction is {config.train_fraction}, of {rows} that is none: raise it")
    if count < len(train.texts):
        notes.append(f"{count:,} of {len(train.texts):,} training rows are taken")
        train = train.only(stratified(train.labels, count, config.seed))
    ordered = {"train": train, "validation": splits["validation"], **splits}
    return {**ordered, "train": train}, notes


def _unused_format(form: TextFormat, files: dict[str, list[Path]]) -> list[str]:
    """Notes on a --delimiter and an --encoding that no file uses."""
    names = [path.name.lower().removesuffix(".gz") for paths in files.values() for path in paths]
    notes = []
    if form.delimiter is not None and not any(name.endswith((".csv", ".tsv")) for name in names):
        notes.append("--delimiter has no effect, as no file is a .csv or .tsv")
    if form.encoding is not None and not any(name.endswith(tuple(TEXT_SUFFIXES)) for name in names):
        notes.append("--encoding has no effect, as no file is text")
    return notes


def _configured_names(config: Config) -> list[str] | None:
    """The label names of --label-names."""
    return None if config.label_names is None else [name.strip() for name in config.label_names.split(",")]


def _require_name_for_each(train: Split, names: Sequence[str]) -> None:
    """Check that --label-names names each number of the training split: 0, 1, ..., or as many others.

    A single name is left for `label_tokens`.

    Raises:
        UsageError: a label is not one of 0, 1, ..., and there are not as many names as labels.
    """
    numbers = sorted(set(train.labels))
    row = next((row for row, label in enumerate(train.labels) if not 0 <= label < len(names)), None)
    if row is not None and 1 < len(names) != len(numbers):
        raise UsageError(
            f"--label-names has {counted(len(names), 'name')}, {listed(names)}, and the training rows have "
            f"{counted(len(numbers), 'label')}, {listed(list(map(str, numbers)))}, such as {train.labels[row]} in "
            f"{train.where(row)}: name each, in ascending order, or correct the data"
        )


def _name_numbers(splits: dict[str, Split], label_names: Sequence[str] | None) -> tuple[dict[str, Split], list[str]]:
    """Name the numbers of the training split that are not 0, 1, ..., such as stars from 1 to 5.

    Without `label_names` the numbers are their own names. Otherwise the names are those of the numbers in ascending
    order, if there are as many of each.

    Returns:
        The splits, with labels that are places in the names, and at most one note.

    Raises:
        FtError: another split has a label that the training split has not.
    """
    train = splits["train"]
    numbers = sorted(set(train.labels))
    if train.in_words or train.label_names is not None:
        return splits, []
    if label_names is None:
        names = tuple(map(str, numbers))
        note = f"the labels are the numbers {listed(names)} themselves; --label-names names them in this order"
    elif len(label_names) == len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(numbers):
        names = tuple(label_names)
        pairs = [f"{number} is {name}" for number, name in zip(numbers, names, strict=True)]
        note = f"the label {listed(pairs)}"
    else:
        return splits, []
    index_of = {number: i for i, number in enumerate(numbers)}
    for split in splits.values():
        row = next((row for row, label in enumerate(split.labels) if label not in index_of), None)
        if row is not None:
            raise FtError(
                f"the label in {split.where(row)} is {split.labels[row]}, those to train on are "
                f"{listed(list(map(str, numbers)))}: correct the data"
            )
    named = {
        name: replace(
            split,
            labels=[index_of[label] for label in split.labels],
            label_names=names,
            label_numbers=None if label_names is None else tuple(numbers),
            in_words=True,
        )
        for name, split in splits.items()
    }
    return named, [note]


def renumber(split: Split, names: Sequence[str]) -> Split:
    """Number the labels of a split by their places in `names`, if its files name the numbers.

    If none of its label names is in `names`, the split is returned as it is.

    Raises:
        FtError: the label of a row is not in `names`.
    """
    split_names = split.label_names
    if split.in_words or split_names is None or list(split_names) == list(names) or not set(split_names) & set(names):
        return split
    number_of = {name: number for number, name in enumerate(names)}
    labels = []
    for row, label in enumerate(split.labels):
        name = split_names[label] if 0 <= label < len(split_names) else str(label)
        if name not in number_of:
            raise FtError(
                f"the label in {split.where(row)} is {name!r}, the labels are {listed(names)}: correct the data"
            )
        labels.append(number_of[name])
    return replace(split, labels=labels, label_names=tuple(names))


def _check_labels_agree(
    splits: dict[str, Split], files: dict[str, list[Path]], label_names: Sequence[str] | None
) -> None:
    """Check that a label is the same class in all splits.

    If one split has words and another numbers, the number of each word must be known: from the `label_names` of the
    user or the model, or from the names of the numbers in the training files. Names that are numbers themselves are
    ambiguous.

    Raises:
        FtError: the number of a word is not known.
    """
    train = splits["train"]
    names = label_names or (None if train.in_words else train.label_names)
    known = names is not None and not any(map(WHOLE_NUMBER.fullmatch, names))
    for name, split in splits.items():
        if split.in_words != train.in_words and not known:
            kinds = [
                f"{'the word' if one.in_words else 'the number'} {shown(_first_label(one))}" for one in (train, split)
            ]
            raise FtError(
                f"the label in row 0 of {files['train'][0]} is {kinds[0]}, that in row 0 of {files[name][0]} "
                f"{kinds[1]}: write the labels of both alike, or name the words of the numbers 0, 1, ... in their "
                "order by --label-names neg,pos"
            )


def _first_label(split: Split) -> str | int:
    """The label of the first row as in the file."""
    label = split.labels[0]
    return split.label_names[label] if split.in_words and split.label_names else label


def read_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Download and read the data set, and tokenize it.

    Raises:
        FtError: the data cannot be read or do not fit the labels.
    """
    splits, notes = read_splits(config)
    names: tuple[str, ...] = ()
    label_ids: list[int] = []
    if config.completion_column is None:
        names = names_of(config, splits["train"])
        # Words in the data cannot be renamed by --label-names; if they begin alike, only numbers distinguish them.
        or_numbers = config.label_names is None or splits["train"].in_words
        label_ids = label_tokens(names, tokenizer, or_numbers=or_numbers)
        notes += _notes_on_tokens(names, label_ids, tokenizer)
    complete = {name: encode(split, tokenizer, label_ids, UNLIMITED) for name, split in splits.items()}
    lengths = {name: list(map(length_of, examples)) for name, examples in complete.items()}
    cut = {name: [keep_end(each, config.max_length) for each in examples] for name, examples in complete.items()}
    return Data(splits, cut, names, label_ids, tokenizer, lengths, notes)


def names_of(config: Config, train: Split) -> tuple[str, ...]:
    """The label names: those of --label-names, else those of the training split."""
    return tuple(_configured_names(config) or train.label_names or ())


def _notes_on_tokens(names: Sequence[str], label_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Notes on labels that are not represented by their full name as a single token."""
    words = [tokenizer.decode([token]) for token in label_ids]
    if words == [str(number) for number in range(len(names))] != list(names):
        first = f"0 for {shown(names[0])}, 1 for {shown(names[1])}"
        return [f"several labels begin alike, so that numbers stand for them: {first} and so on"]
    longer = [(name, word) for name, word in zip(names, words, strict=True) if word != name]
    if len(longer) > MOST_NOTES:
        (name, word), count = longer[0], len(longer)
        return [
            f"{count} labels are several tokens, of which the first stands for each: {shown(word)} for {shown(name)}, "
            "and so on"
        ]
    return [
        f"the label {shown(name)} is several tokens; its first, {shown(word)}, stands for it" for name, word in longer
    ]
