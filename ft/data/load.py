"""What a run reads: the model's configuration, and its data set as examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from ft.config import Config
from ft.data import dataset_files
from ft.data.examples import Example, encode, label_tokens
from ft.data.splits import Split, stratified
from ft.data.tables import WHOLE_NUMBER, Columns, NoLabelsError, listed, read_split
from ft.data.text_files import TextFormat
from ft.errors import FtError, UsageError, shown

VALIDATION_FRACTION = 0.1  # of the training rows, to validate on where there is no split for it
MOST_NOTES = 4  # on labels of several tokens; of more there is one for all


@dataclass(frozen=True)
class Data:
    """The splits as read, the same as examples, and what the labels are called and encoded as.

    Attributes:
        splits: the rows, by split.
        examples: what the model sees of them, in the same order.
        label_names: empty where there are completions instead of labels.
        label_ids: the token that stands for each label.
        tokenizer: that of the model.
        notes: what the user should know of how the data were read, a sentence each.
    """

    splits: dict[str, Split]
    examples: dict[str, list[Example]]
    label_names: tuple[str, ...]
    label_ids: list[int]
    tokenizer: Tokenizer
    notes: list[str]

    def sha256(self) -> str:
        """What tells these examples from others."""
        digest = hashlib.sha256()
        for name, examples in self.examples.items():
            digest.update(name.encode())
            for example in examples:
                digest.update(repr(example).encode())
        return digest.hexdigest()


def with_demo_inputs(config: Config, folder: Path, *, write: bool = True) -> Config:
    """The same configuration on a small model and reviews in `folder`, made there on the spot by whom `write` tells."""
    from ft.data.demo import write_demo  # here, as the real job has no use for it

    if write:
        write_demo(folder)
    return replace(config, model=str(folder / "model"), dataset=str(folder / "dataset"))


def columns_of(config: Config) -> Columns:
    """The columns that a run reads.

    Raises:
        UsageError: there is a column of prompts and none of completions.
    """
    if config.completion_column is None and config.prompt_column != Config.prompt_column:
        raise UsageError(
            f"--prompt-column is {shown(config.prompt_column)} without --completion-column: give both or neither"
        )
    if config.completion_column is not None:
        return Columns(text=config.prompt_column, completion=config.completion_column)
    return Columns(text=config.text_column, label=config.label_column)


def read_splits(config: Config, label_names: Sequence[str] | None = None) -> tuple[dict[str, Split], list[str]]:
    """Fetch and read the data set, set validation rows aside where it has none, and take what is to be trained on.

    Args:
        config: the run's settings.
        label_names: the words of the labels; those of `config` or of the training split when left out.

    Returns:
        The splits, and what the user should know of how they came about.

    Raises:
        FtError: the data cannot be read.
    """
    columns, form = columns_of(config), TextFormat(config.delimiter, config.encoding)
    files = dataset_files.dataset_files(config.dataset, config.dataset_revision, config.dataset_config)
    if config.save_dataset is not None:
        dataset_files.save_dataset(files, Path(config.save_dataset))
    label_names = label_names or _named(config)
    splits: dict[str, Split] = {}
    notes: list[str] = []
    for name, paths in files.items():  # the training split first, whose words are the labels of all
        names = label_names or (splits["train"].label_names if splits else None)
        try:
            splits[name] = read_split(name, paths, columns, names, form)
        except NoLabelsError as error:
            if name == "train":
                raise
            notes.append(f"the {name} split is left out: {str(error).partition(';')[0]}")
            continue
        notes += splits[name].notes
    if columns.completion is None:
        _refuse_labels_of_two_kinds(splits, files, label_names)
        told = splits["train"].label_names
        if told is not None and len(set(told) - {""}) == len(told) > 1:  # others are refused with their reason later
            splits = {name: numbered_as(split, told) for name, split in splits.items()}
        if label_names is None and splits["train"].label_names is None:
            splits = _with_numbers_as_names(splits)
            named = listed(splits["train"].label_names or ())
            notes.append(
                f"the labels are the numbers {named} as they are; --label-names gives them words in this order"
            )
    train = splits["train"]
    if "validation" not in splits:
        count = round(VALIDATION_FRACTION * len(train.texts))
        if not 0 < count < len(train.texts):
            raise FtError(
                f"{config.dataset} has no validation split, and its {len(train.texts)} training rows are too few to "
                "set some aside: add a split or rows"
            )
        aside = set(stratified(train.labels, count, config.seed))
        splits["validation"] = train.only(sorted(aside), "validation")
        train = train.only([row for row in range(len(train.texts)) if row not in aside])
        notes.append(f"there is no validation split: {count:,} training rows, drawn by --seed, are set aside for it")
    count = round(config.train_fraction * len(train.texts))
    count = min(count, config.max_train_samples or count)
    if count == 0:
        raise FtError(
            f"--train-fraction is {config.train_fraction}, of {len(train.texts):,} training rows that is none: raise it"
        )
    if count < len(train.texts):
        notes.append(f"{count:,} of {len(train.texts):,} training rows are taken")
        train = train.only(stratified(train.labels, count, config.seed))
    ordered = {"train": train, "validation": splits["validation"], **splits}
    return {**ordered, "train": train}, notes


def _named(config: Config) -> list[str] | None:
    """The labels that --label-names tells."""
    return None if config.label_names is None else [name.strip() for name in config.label_names.split(",")]


def _with_numbers_as_names(splits: dict[str, Split]) -> dict[str, Split]:
    """The same splits with the numbers of the training split, such as stars from 1 to 5, as names of the labels.

    Raises:
        FtError: another split holds another number.
    """
    numbers = sorted(set(splits["train"].labels))
    place = {number: i for i, number in enumerate(numbers)}
    names = tuple(map(str, numbers))
    for name, split in splits.items():
        row = next((row for row, label in enumerate(split.labels) if label not in place), None)
        if row is not None:
            raise FtError(
                f"the label in row {row} of the {name} split is {split.labels[row]}, those to train on are "
                f"{listed(names)}: correct the data"
            )
    return {
        name: replace(split, labels=[place[label] for label in split.labels], label_names=names, in_words=True)
        for name, split in splits.items()
    }


def numbered_as(split: Split, names: Sequence[str]) -> Split:
    """A split whose files give names to numbers, with the numbers that these names have in `names`.

    Where none of its names is among these, numbers are taken as they are.

    Raises:
        FtError: a label of a row is not among them.
    """
    told = split.label_names
    if split.in_words or told is None or list(told) == list(names) or not set(told) & set(names):
        return split
    place = {name: number for number, name in enumerate(names)}
    labels = []
    for row, label in enumerate(split.labels):
        name = told[label] if 0 <= label < len(told) else str(label)
        if name not in place:
            number = split.rows[row] if split.rows else row
            raise FtError(
                f"the label in row {number} of the {split.name} split is {name!r}, the labels are {listed(names)}: "
                "correct the data"
            )
        labels.append(place[name])
    return replace(split, labels=labels, label_names=tuple(names))


def _refuse_labels_of_two_kinds(
    splits: dict[str, Split], files: dict[str, list[Path]], label_names: Sequence[str] | None
) -> None:
    """See that a label is the same class in every split.

    One split may tell words and another numbers only where it is known which word belongs to which number: by the
    `label_names` that the user or the model gives, or by those that the training files give to their own numbers.
    Names that are numbers themselves make that known to nobody.

    Raises:
        FtError: it is not known.
    """
    train = splits["train"]
    names = label_names or (None if train.in_words else train.label_names)
    known = names is not None and not any(map(WHOLE_NUMBER.fullmatch, names))
    for name, split in splits.items():
        here, there = files["train"][0], files[name][0]
        if split.in_words != train.in_words and not known:
            kinds = [
                f"{'the word' if each.in_words else 'the number'} {shown(_first_label(each))}"
                for each in (train, split)
            ]
            raise FtError(
                f"the label in row 0 of {here} is {kinds[0]}, that in row 0 of {there} {kinds[1]}: write the labels of "
                "both alike, or name the words of the numbers 0, 1, ... in their order by --label-names neg,pos"
            )


def _first_label(split: Split) -> str | int:
    """The label of the first row as the file tells it."""
    label = split.labels[0]
    return split.label_names[label] if split.in_words and split.label_names else label


def read_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Fetch and read the data set, and make the examples.

    Raises:
        FtError: the data cannot be read or do not fit the labels.
    """
    splits, notes = read_splits(config)
    names: tuple[str, ...] = ()
    label_ids: list[int] = []
    if config.completion_column is None:
        names = names_of(config, splits["train"])
        # Words in the data cannot be given other names, so that numbers must tell them apart.
        or_numbers = config.label_names is None or splits["train"].in_words
        label_ids = label_tokens(names, tokenizer, or_numbers=or_numbers)
        notes += _notes_on_tokens(names, label_ids, tokenizer)
    examples = {name: encode(split, tokenizer, label_ids, config.max_length) for name, split in splits.items()}
    return Data(splits, examples, names, label_ids, tokenizer, notes)


def names_of(config: Config, train: Split) -> tuple[str, ...]:
    """What the labels are called."""
    return tuple(_named(config) or train.label_names or ())


def _notes_on_tokens(names: Sequence[str], label_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Which labels are not their own word's single token."""
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
