"""From tables to splits: find the columns, check their values, and number the labels, whatever the file format."""

import json
import math
import re
from collections.abc import Sequence, Set
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ft.data.arrow_files import read_arrow_table, read_parquet_table
from ft.data.examples import require_utf8
from ft.data.json_files import read_json_table
from ft.data.splits import Split
from ft.data.table import (
    FileRows,
    NoLabelsError,
    Table,
    find_columns,
    first_line,
    listed,
    read_errors,
    read_values,
    shown_value,
    where_in_files,
)
from ft.data.text_files import TextFormat, read_csv_table
from ft.errors import FtError
from ft.io.formats import suffix_of

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
WHOLE_FLOAT = re.compile(r"([+-]?[0-9]{1,18})\.0*")  # as pandas writes whole numbers of a column with gaps
NO_LABEL = -1  # by convention, a label that is not published
# Missing values as pandas, R and Excel write them into text files; among whole numbers they are not labels.
MISSING = {"NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "-"}


class Columns(NamedTuple):
    """The columns to read: a text and its label, or with `completion` a prompt and its completion."""

    text: str = "text"
    label: str = "label"
    completion: str | None = None

    @property
    def answer(self) -> str:
        """The column of the targets."""
        return self.label if self.completion is None else self.completion

    def flags(self) -> dict[str, str]:
        """The flag of each column, by the column's name."""
        if self.completion is not None:
            return {self.text: "--prompt-column", self.completion: "--completion-column"}
        return {self.text: "--text-column", self.label: "--label-column"}


def read_split(
    name: str,
    paths: Sequence[Path],
    columns: Columns | None = None,
    label_names: Sequence[str] | None = None,
    form: TextFormat | None = None,
    *,
    skip_empty: bool = False,
    remedy: str = "correct the data, or name all labels by --label-names",
) -> Split:
    """Read the rows of a split from its files.

    Labels are whole numbers or words. A word becomes a number: its index in `label_names`, or in the sorted list of all
    words. Whole numbers written as text count as numbers, unless all of them are among `label_names`; true and false
    are the words True and False.

    Args:
        name: train, validation or test.
        paths: the files.
        columns: the columns to read.
        label_names: the names of the labels.
        form: the delimiter and encoding of text files, if the user names them.
        skip_empty: leave out rows without a text, label or completion, or in which it is blank.
        remedy: the advice in the error about a word that is not in `label_names`.

    Raises:
        NoLabelsError: no row has a label, or there is no such column.
        FtError: a file cannot be read, a column is missing or of another type, or a value is missing or not among the
            label names.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    columns = columns or Columns()
    tables = [_read(path, list(columns.flags()), form or TextFormat()) for path in paths]
    texts: list[str | None] = []
    answers: list[Any] = []
    files: list[FileRows] = []
    published_names: tuple[str, ...] | None = None
    for table in tables:
        text_place, answer_place = find_columns(table, columns.flags())
        values = _texts(table, text_place, columns.text)
        texts += values
        files.append(FileRows(table.path, len(values), table.lines))
        if columns.completion is not None:
            answers += _texts(table, answer_place, columns.completion)
        else:
            labels = _labels(table, answer_place, columns.label, MISSING.difference(label_names or ()))
            answers += labels
            if any(isinstance(label, int) for label in labels):
                published_names = published_names or _names_in_metadata(table, answer_place)
    listed_files = ", ".join(map(str, paths))
    if not texts:
        raise FtError(f"the {name} split has no rows ({listed_files})")
    if columns.completion is None and set(answers) <= {None, NO_LABEL, str(NO_LABEL)}:
        raise NoLabelsError(
            f"no row of the {name} split has a label ({listed_files}); name their column by --label-column, or take "
            "another split"
        )
    rows, note = _rows_to_keep(files, texts, answers, columns, skip_empty=skip_empty)
    notes = (*(note for table in tables for note in table.notes), *([note] if note else []))
    split = Split(name, [str(texts[row]) for row in rows], [0] * len(rows), files=tuple(files), notes=notes)
    if len(rows) < len(texts):
        split = replace(split, rows=tuple(rows))
    answers = [answers[row] for row in rows]
    if columns.completion is not None:
        return replace(split, completions=answers)
    return number_labels(split, answers, label_names, published_names, columns.label, remedy)


def _rows_to_keep(
    files: Sequence[FileRows],
    texts: Sequence[str | None],
    answers: Sequence[Any],
    columns: Columns,
    *,
    skip_empty: bool,
) -> tuple[Sequence[int], str | None]:
    """The rows to read, and a note on those that are left out or blank.

    A row is empty without a text or an answer (a label or completion). A blank text or completion is kept unless
    `skip_empty`; a blank prompt is always kept, as end-of-text takes its place.

    Raises:
        FtError: values are missing and `skip_empty` is false, or all rows are empty.
    """
    missing = {
        name: [row for row, value in enumerate(values) if value is None]
        for name, values in ((columns.text, texts), (columns.answer, answers))
    }
    what = columns.text if columns.completion is None else columns.completion
    blank_values = texts if columns.completion is None else answers
    blank = [row for row, value in enumerate(blank_values) if value is not None and not value.strip()]
    empty = {row for rows in missing.values() for row in rows}
    if skip_empty:
        empty.update(blank)
        kept = [row for row in range(len(texts)) if row not in empty]
        if not kept:
            raise FtError(f"--skip-empty leaves no row of {', '.join(str(file.path) for file in files)}: all are empty")
        note = f"{where_in_files(files, sorted(empty))} without {columns.text} or {columns.answer}: left out"
        return kept, note if empty else None
    if empty:
        raise FtError(
            "; ".join(
                f"the {name} in {where_in_files(files, rows)} is missing" for name, rows in missing.items() if rows
            )
            + f"; fill it in, or leave the row{'s' * (len(empty) > 1)} out by --skip-empty"
        )
    note = f"the {what} in {where_in_files(files, blank)} is blank, and is kept; --skip-empty leaves it out"
    return range(len(texts)), note if blank else None


def read_table(path: Path, column: str, form: TextFormat | None = None) -> tuple[Table, list[str | None]]:
    """Read a file of any supported format, and one column of texts; None for a missing one.

    Raises:
        FtError: the file cannot be read, has no such column, or the column holds other values than text.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    table = _read(path, [column], form or TextFormat())
    (place,) = find_columns(table, {column: "--text-column"})
    return table, _texts(table, place, column)


def read_other_columns(path: Path, columns: Columns, form: TextFormat) -> list[tuple[str, Sequence[Any]]]:
    """Read the name and the values of each column that `read_split` does not read from a file, in their order.

    Raises:
        FtError: the file cannot be read.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    table = _read(path, list(columns.flags()), form)
    done = find_columns(table, columns.flags())
    return [(name, read_values(table, place)) for place, name in enumerate(table.names) if place not in done]


def read_texts(path: Path, column: str, form: TextFormat | None = None) -> tuple[list[str], tuple[str, ...]]:
    """Read one column of texts from a file of any supported format.

    Returns:
        The texts, and notes for the user on how the file was read.

    Raises:
        FtError: the file cannot be read, has no such column, or the column holds other values than text.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    table, values = read_table(path, column, form)
    rows = [row for row, value in enumerate(values) if value is None]
    if rows:
        raise FtError(
            f"the {column} in {table.where(rows)} is missing; fill it in or leave the row{'s' * (len(rows) > 1)} out"
        )
    return [str(value) for value in values], table.notes


def _texts(table: Table, place: int, column: str) -> list[str | None]:
    """The texts of a column; None for a missing one."""
    values = read_values(table, place)
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise FtError(f"the {column} in {table.where([row])} is {shown_value(value)}, it must be text")
        if value is not None and not value.isascii():
            require_utf8(value, f"the {column} in {table.where([row])}")
    return list(values)


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(table: Table, place: int, column: str, missing: Set[str]) -> list[str | int | None]:
    """The labels as words or whole numbers; None for a missing label, and among numbers for a word in `missing`."""
    labels: list[str | int | None] = []
    for row, value in enumerate(read_values(table, place)):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            labels.append(None)
        elif isinstance(value, str):
            labels.append(value.strip() or None)
        elif isinstance(value, bool):  # which is an int to Python
            labels.append(str(value))
        elif isinstance(value, int) or (isinstance(value, float | Decimal) and value == value // 1):
            labels.append(int(value))
        else:
            is_fraction = isinstance(value, float | Decimal) and value == value
            remedy = "; to take such numbers as classes, write them as words, as in '0.5 stars'" if is_fraction else ""
            raise FtError(
                f"the {column} in {table.where([row])} is {shown_value(value)}, it must be a whole number or a word"
                + remedy
            )
    words = {label for label in labels if isinstance(label, str)}
    if words & missing and words - missing and all(_whole_number(word) is not None for word in words - missing):
        return [None if label in missing else label for label in labels]
    return labels


def number_labels(
    split: Split,
    labels: Sequence[str | int],
    given: Sequence[str] | None,
    published: Sequence[str] | None,
    column: str,
    remedy: str,
) -> Split:
    """Number the labels of the rows of a split.

    Whole numbers are words if all of them are among the names `given`, such as stars from 1 to 5, unless the numbers
    0, 1, ... have `published` names.

    Args:
        split: the rows.
        labels: the label of each row.
        given: the label names of the user or the model.
        published: the names of the numbers 0, 1, ... in the data.
        column: the name of the labels in messages.
        remedy: the advice in the error about a word that is not among the names `given`.

    Returns:
        The split with labels, and with the label names if they are words or published.

    Raises:
        FtError: the labels are numbers and words, or a word is not among the names `given`.
    """
    number_of = {label: _whole_number(label) for label in set(labels)}
    numbers = [number_of[label] or 0 for label in labels]
    are_numbers = None not in number_of.values()
    words = list(map(str, labels))
    if are_numbers and not (given and set(words) <= set(given)):
        words = list(map(str, numbers))
    if are_numbers and (given is None or published is not None or not set(words) <= set(given)):
        names = None if published is None else tuple(published)
        return replace(split, labels=numbers, label_names=names)
    names = tuple(given) if given is not None else tuple(sorted(set(words)))
    if any(isinstance(label, int) for label in labels) and not set(words) <= set(given or ()):
        paths = ", ".join(str(file.path) for file in split.files)
        raise FtError(f"the column {column!r} holds numbers and words ({paths})")
    place_of = {name: number for number, name in enumerate(names)}
    row = next((row for row, word in enumerate(words) if word not in place_of), None)
    if row is not None:
        raise FtError(
            f"the {column} in {split.where(row)} is {shown_value(words[row])}, the labels are {listed(names)}; {remedy}"
        )
    return replace(split, labels=[place_of[word] for word in words], label_names=names, in_words=True)


def _whole_number(label: str | int) -> int | None:
    """The whole number that a label is or spells, as 1 or as 1.0; None if it is another word."""
    if isinstance(label, int):
        return label
    digits = match[1] if (match := WHOLE_FLOAT.fullmatch(label)) else label
    return int(digits) if WHOLE_NUMBER.fullmatch(digits) else None


def _names_in_metadata(table: Table, place: int) -> tuple[str, ...] | None:
    """The class names of a column, which the `datasets` library stores as JSON in the metadata of a file.

    Raises:
        FtError: the metadata are not UTF-8; without them, numbers would silently become the names.
    """
    try:
        features = json.loads((table.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[table.names[place]]["names"]
    except UnicodeDecodeError as error:
        raise FtError(
            f"the metadata of {table.path}, which name its labels, are not valid UTF-8 ({error.reason} at byte "
            f"{error.start}): write the file again, or save it as .csv and name them by --label-names"
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path, wanted: Sequence[str], form: TextFormat) -> Table:
    """Read a table from a file of any supported format.

    Raises:
        FtError: the file cannot be read.
    """
    kind = (suffix_of(path.name) or ".parquet").removesuffix(".gz").removeprefix(".")
    try:
        match kind:
            case "csv" | "tsv":
                return read_csv_table(path, wanted, form)
            case "json" | "jsonl" | "ndjson":
                return read_json_table(path, wanted, form)
            case "arrow" | "feather":
                return read_arrow_table(path)
        return read_parquet_table(path)
    except MemoryError as error:
        raise FtError(f"cannot read {path}: it does not fit into memory; split it into several") from error
    except read_errors() as error:
        raise FtError(f"cannot read {path} as {kind}: {first_line(error)}") from error
