"""Rows that a caller passes, as lists, columns or tables of other libraries: checked, and written as a data set.

Tables of `datasets`, pandas, polars and pyarrow are recognized by their methods; none of these libraries is imported.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft.data.dataset_files import SPLITS
from ft.data.examples import require_utf8
from ft.errors import UsageError, shown
from ft.io.atomic import atomic_directory

CONVERSIONS = ("to_pylist", "tolist", "to_list")  # of pyarrow; of numpy, pandas and torch; of polars


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
        texts: the texts, or prompts.
        answers: a label for each text, of one type; or completions.
        label_names: the words for the labels 0, 1, ..., if the table names them.
    """

    texts: list[str]
    answers: list[int] | list[bool] | list[str]
    label_names: tuple[str, ...] | None = None


def read_rows(
    texts: object,
    labels: object,
    validation: object,
    test: object,
    *,
    text_column: str,
    answer_column: str,
    is_completion: bool,
) -> dict[str, Rows]:
    """Check the rows that `ft.fine_tune` was called with, and convert them to lists.

    Args:
        texts: the training texts; or a table that also has the labels; or a mapping from splits to tables.
        labels: the label or completion of each text; None if `texts` has them.
        validation: a pair of texts and labels, a table, or None.
        test: likewise.
        text_column: the column of a table with the texts.
        answer_column: the column with the labels or completions.
        is_completion: whether the answers are completions.

    Returns:
        The rows of `train` and, if they are given, of `validation` and `test`.

    Raises:
        UsageError: with one sentence for each problem.
    """
    columns = text_column, answer_column
    given: dict[str, object] = {"train": texts if labels is None else (texts, labels)}
    if isinstance(texts, Mapping) and text_column not in texts:
        if labels is not None:
            raise UsageError("labels are given beside a mapping of splits, which has them: leave them out")
        given = {SPLITS[name]: table for name, table in texts.items() if name in SPLITS}
        if "train" not in given:
            raise UsageError(f"the data have neither a column {text_column!r} nor a split train, but {shown([*texts])}")
    for name, split in (("validation", validation), ("test", test)):
        if split is not None and name in given:
            raise UsageError(f"the data have a {name} split, and {name} is given too: leave one out")
        given |= {} if split is None else {name: split}
    problems: list[str] = []
    found: dict[str, Rows] = {}
    for name, split in given.items():
        try:
            found[name] = _rows_of(split, name, columns, is_completion=is_completion)
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*problems)
    kinds = {name: type(rows.answers[0]) for name, rows in found.items()}
    different = [name for name, kind in kinds.items() if kind is not kinds["train"]]
    if different and found["train"].label_names is None:
        raise UsageError(
            f"the labels to train on are like {shown(found['train'].answers[0])}, those of {different[0]} like "
            f"{shown(found[different[0]].answers[0])}: pass labels of one type"
        )
    return found


def _rows_of(split: object, name: str, columns: tuple[str, str], *, is_completion: bool) -> Rows:
    """The rows of one split, from a pair or a table.

    Raises:
        UsageError: the split is neither, or a value is missing or of the wrong type.
    """
    of_split = "" if name == "train" else f" of {name}"
    nouns = ("prompts", "completions") if is_completion else ("texts", "labels")
    label_names = None
    if isinstance(split, tuple) and len(split) == 2:
        columns_given: Sequence[object] = split
    else:
        names = _column_names(split)
        if names is None:
            if name == "train" and hasattr(split, "__getitem__"):
                raise UsageError(f"{nouns[1]} are missing: pass one for each of the {nouns[0]}, or a table with both")
            noun, pair = name, f"a tuple ({', '.join(nouns)})"
            if name == "train":
                noun, pair = nouns[0], f"lists of {nouns[0]} and {nouns[1]}"
            raise UsageError(f"{noun} is {shown(split)}: pass {pair}, or a table in memory with both")
        if absent := [column for column in columns if column not in names]:
            raise UsageError(
                f"the table{of_split} has no column {absent[0]!r}, its columns are {shown(names)}: name them by "
                + ("--prompt-column and --completion-column" if is_completion else "--text-column and --label-column")
            )
        columns_given = [split[column] for column in columns]  # type: ignore[index]
        label_names = _published_names(split, columns[1])
    texts, answers = (_to_list(values, noun + of_split) for values, noun in zip(columns_given, nouns, strict=True))
    if len(texts) != len(answers):
        raise UsageError(
            f"there are {len(texts):,} {nouns[0]}{of_split} and {len(answers):,} {nouns[1]}: pass one for each"
        )
    if not texts:
        raise UsageError(f"there are no {nouns[0]}{of_split}: pass at least one")
    checked = _checked_texts(texts, nouns[0], of_split)
    if is_completion:
        return Rows(checked, _checked_texts(answers, nouns[1], of_split))
    return Rows(checked, _checked_labels(answers, of_split), label_names)


def _column_names(table: object) -> list[str] | None:
    """The columns of a table; None for what is not a table."""
    if isinstance(table, Mapping):
        return list(table)
    names = getattr(table, "column_names", getattr(table, "columns", None))
    return None if names is None or not hasattr(table, "__getitem__") else list(names)


def _published_names(table: object, column: str) -> tuple[str, ...] | None:
    """The words for the labels 0, 1, ..., which `datasets` has as a `ClassLabel`."""
    features = getattr(table, "features", None)
    names = getattr(features.get(column), "names", None) if isinstance(features, Mapping) else None
    return None if names is None else tuple(names)


def _to_list(values: object, noun: str) -> list[Any]:
    """A column as a list.

    Raises:
        UsageError: it is a single string, has no order, or is not a sequence.
    """
    if isinstance(values, str | bytes | Mapping | Set):
        raise UsageError(f"{noun} is the {type(values).__name__} {shown(values)}, it must be a list")
    for name in CONVERSIONS:
        if hasattr(values, name):
            values = getattr(values, name)()
            break
    if not isinstance(values, Iterable):
        raise UsageError(f"{noun} is {shown(values)}, it must be a list")
    return list(values)


def to_scalar(value: Any) -> Any:  # noqa: ANN401
    """A scalar of numpy or torch as a number; other values, such as arrays of several numbers, unchanged."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):
        return value


def _is_missing(value: object) -> bool:
    """Whether a value is None, NaN, NaT or the `NA` of pandas."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _refuse_missing(values: Sequence[object], noun: str, of_split: str) -> None:
    rows = [row for row, value in enumerate(values) if _is_missing(value)]
    if rows:
        numbers = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise UsageError(
            f"{len(rows):,} of the {noun}{of_split} {'is' if len(rows) == 1 else 'are'} missing, like "
            f"{shown(values[rows[0]])} (at {numbers}): fill them in or leave these rows out"
        )


def _checked_texts(values: Sequence[object], noun: str, of_split: str) -> list[str]:
    """The texts as `str`.

    Raises:
        UsageError: one is missing or not a string.
        FtError: one is not valid UTF-8.
    """
    _refuse_missing(values, noun, of_split)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UsageError(f"{noun}{of_split} has {shown(value)} at {row}, it must be a string")
        require_utf8(value, f"{noun}{of_split} at {row}")
    return list(map(str, values))  # numpy has its own subclass


def _checked_labels(values: Sequence[Any], of_split: str) -> list[int] | list[bool] | list[str]:
    """The labels, of one type: whole numbers, words, or true and false.

    Raises:
        UsageError: one is missing or of another type, or the types differ.
        FtError: one is not valid UTF-8.
    """
    labels = [to_scalar(value) for value in values]
    labels = [None if isinstance(label, str) and not label.strip() else label for label in labels]
    _refuse_missing(labels, "labels", of_split)
    labels = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
    kinds: dict[type, int] = {}  # with the first row of each
    for row, label in enumerate(labels):
        kind = next((kind for kind in (bool, int, str) if isinstance(label, kind)), None)
        if kind is None or (kind is int and abs(label) >= 2**63):
            raise UsageError(f"labels{of_split} has {shown(label)} at {row}, it must be a whole number or a word")
        if kind is str:
            require_utf8(label, f"labels{of_split} at {row}")
        kinds.setdefault(kind, row)
        if len(kinds) > 1:
            one, other = (f"{shown(labels[row])} at {row}" for row in kinds.values())
            raise UsageError(f"labels{of_split} has {one} and {other}: pass labels of one type")
    return [next(iter(kinds))(label) for label in labels]


def require_two_labels(rows: Mapping[str, Rows]) -> None:
    """Check that there are two classes at least.

    Raises:
        UsageError: all labels to train on are the same, and they have no names.
    """
    train = rows["train"]
    if train.label_names is None and len(set(train.answers)) == 1:
        raise UsageError(
            f"all {len(train.answers):,} labels are {shown(train.answers[0])}: there must be two different ones or "
            "more; name all by --label-names if the others are rare"
        )


def digest_of(rows: Mapping[str, Rows]) -> str:
    """Sixteen hexadecimal digits that identify the rows, for the name of their directory."""
    digest = hashlib.sha256()
    for name, split in rows.items():
        digest.update(json.dumps([name, split.texts, split.answers, split.label_names]).encode())
    return digest.hexdigest()[:16]


def write_rows(rows: Mapping[str, Rows], columns: Mapping[str, str], directory: Path) -> None:
    """Write the rows as a data set, a parquet file per split with label names in its metadata as `datasets` writes it.

    Args:
        rows: the rows of each split.
        columns: `text_column` and `answer_column`, the names of the columns.
        directory: the directory of the data set, which does not exist.

    Raises:
        OSError: the disk is full or the system refuses; `directory` does not exist then.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_directory(directory) as staged:
        for name, split in rows.items():
            table = pa.table({columns["text_column"]: split.texts, columns["answer_column"]: split.answers})
            if split.label_names is not None:
                features = {columns["answer_column"]: {"names": split.label_names, "_type": "ClassLabel"}}
                metadata = {"huggingface": json.dumps({"info": {"features": features}})}
                table = table.replace_schema_metadata(metadata)
            content = io.BytesIO()
            pq.write_table(table, content)
            staged.write(f"{name}.parquet", [content.getvalue()])
