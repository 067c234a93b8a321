"""From tables to splits: find the columns, check their values, and number the labels, whatever the file format."""

import json
import math
import re
import shlex
from collections.abc import Sequence, Set
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ft.data.arrow_files import read_arrow_table, read_errors, read_parquet_table
from ft.data.examples import require_utf8
from ft.data.json_files import read_json_table
from ft.data.splits import Split
from ft.data.table import Table
from ft.data.text_files import TextFormat, read_csv_table
from ft.errors import FtError, printable
from ft.io.formats import suffix_of

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
WHOLE_FLOAT = re.compile(r"([+-]?[0-9]{1,18})\.0*")  # as pandas writes whole numbers of a column with gaps
FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")
NO_LABEL = -1  # by convention, a label that is not published
# Missing values as pandas, R and Excel write them into text files; among whole numbers they are not labels.
MISSING = {"NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "-"}
SAMPLE = 1000  # rows by which columns of text and of labels are recognized
MOST_LABELS = 100  # distinct values of a column that is taken for labels


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


class NoLabelsError(FtError):
    """The split exists, but has no labels."""


def read_split(
    name: str,
    paths: Sequence[Path],
    columns: Columns | None = None,
    label_names: Sequence[str] | None = None,
    form: TextFormat | None = None,
    *,
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
        remedy: the advice in the error about a word that is not in `label_names`.

    Raises:
        NoLabelsError: no row has a label, or there is no such column.
        FtError: a file cannot be read, a column is missing or of another type, or a value is null, empty or not among
            the label names.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    columns = columns or Columns()
    texts: list[str] = []
    answers: list[list[Any]] = []  # the target column of each file
    published_names: tuple[str, ...] | None = None
    tables = [_read(path, list(columns.flags()), form or TextFormat()) for path in paths]
    for table in tables:
        text_place, answer_place = _places(table, columns.flags())
        texts += _texts(table, text_place, columns.text)
        if columns.completion is not None:
            answers.append(_texts(table, answer_place, columns.completion))
        else:
            answers.append(_labels(table, answer_place, columns.label, MISSING.difference(label_names or ())))
            if any(isinstance(label, int) for label in answers[-1]):
                published_names = published_names or _names_in_metadata(table, answer_place)
    if not texts:
        raise FtError(f"the {name} split has no rows ({', '.join(map(str, paths))})")
    notes = tuple(note for table in tables for note in table.notes)
    if columns.completion is not None:
        completions = [text for part in answers for text in part]
        return Split(name, texts, [0] * len(texts), completions=completions, notes=notes)
    if {label for part in answers for label in part} <= {None, NO_LABEL, str(NO_LABEL)}:
        raise NoLabelsError(
            f"no row of the {name} split has a label ({', '.join(map(str, paths))}); name their column by "
            "--label-column, or take another split"
        )
    for table, part in zip(tables, answers, strict=True):
        _refuse_missing(table, part, columns.label)
    numbers, names = _numbered(tables, answers, label_names, published_names, columns.label, remedy)
    return Split(name, texts, numbers, names or published_names, in_words=names is not None, notes=notes)


def read_texts(path: Path, column: str, form: TextFormat | None = None) -> tuple[list[str], tuple[str, ...]]:
    """Read one column of texts from a file of any supported format.

    Returns:
        The texts, and notes for the user on how the file was read.

    Raises:
        FtError: the file cannot be read, has no such column, or the column holds other values than text.
        UsageError: `form` names an invalid delimiter or an unknown encoding.
    """
    table = _read(path, [column], form or TextFormat())
    (place,) = _places(table, {column: "--text-column"})
    return _texts(table, place, column), table.notes


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(table: Table, place: int, column: str, missing: Set[str]) -> list[str | int | None]:
    """The labels as words or whole numbers; None for a missing label, and among numbers for a word in `missing`."""
    labels: list[str | int | None] = []
    for row, value in enumerate(_values(table, place)):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            labels.append(None)
        elif isinstance(value, str):
            labels.append(value.strip() or None)
        elif isinstance(value, bool):  # which is an int to Python
            labels.append(str(value))
        elif isinstance(value, int) or (isinstance(value, float | Decimal) and value == value // 1):
            labels.append(int(value))
        else:
            raise FtError(
                f"the {column} in {table.where([row])} is {_shown(value)}, it must be a whole number or a word"
            )
    words = {label for label in labels if isinstance(label, str)}
    if words & missing and words - missing and all(_whole_number(word) is not None for word in words - missing):
        return [None if label in missing else label for label in labels]
    return labels


def _numbered(
    tables: Sequence[Table],
    answers: Sequence[Sequence[str | int]],
    given: Sequence[str] | None,
    published: Sequence[str] | None,
    column: str,
    remedy: str,
) -> tuple[list[int], tuple[str, ...] | None]:
    """Number the labels; returns the numbers, and the label names if the labels are words.

    Whole numbers are words if all of them are among the names `given` by the user, such as stars from 1 to 5, unless
    the files have `published` names for the numbers 0, 1, ...
    """
    labels = [label for part in answers for label in part]
    number_of = {label: _whole_number(label) for label in set(labels)}
    numbers = [number_of[label] or 0 for label in labels]
    are_numbers = None not in number_of.values()
    words = list(map(str, labels))
    if are_numbers and not (given and set(words) <= set(given)):
        words = list(map(str, numbers))
    if are_numbers and (given is None or published is not None or not set(words) <= set(given)):
        return numbers, None
    names = tuple(given) if given is not None else tuple(sorted(set(words)))
    if any(isinstance(label, int) for label in labels) and not set(words) <= set(given or ()):
        raise FtError(f"the column {column!r} holds numbers and words ({', '.join(str(t.path) for t in tables)})")
    place_of = {name: number for number, name in enumerate(names)}
    row = next((row for row, word in enumerate(words) if word not in place_of), None)
    if row is not None:
        for table, part in zip(tables, answers, strict=True):
            if row < len(part):
                place = table.where([row])
                raise FtError(
                    f"the {column} in {place} is {_shown(words[row])}, the labels are {listed(names)}; {remedy}"
                )
            row -= len(part)
    return [place_of[word] for word in words], names


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


# --- columns and values -----------------------------------------------------------------------------------------------


def _places(table: Table, flags: dict[str, str]) -> list[int]:
    """The indices of the columns named by the keys of `flags`, ignoring blanks around names.

    Raises:
        NoLabelsError: only the target column is missing.
        FtError: a column is missing, or several have its name.
    """
    stripped = [name.strip() for name in table.names]
    found = {}
    for name in flags:
        names = list(table.names) if name in table.names else stripped
        if names.count(name) > 1:
            raise FtError(f"{table.path} has several columns {name!r}: rename all but one")
        if name in names:
            found[name] = names.index(name)
    absent = [name for name in flags if name not in found]
    if absent:
        message = f"{table.path} has no column {absent[0]!r}; its columns are {listed(table.names)}: "
        error = NoLabelsError if absent == list(flags)[1:] else FtError
        raise error(message + _advice_on_columns(table, {name: flags[name] for name in absent}, set(found.values())))
    return list(found.values())


def _advice_on_columns(table: Table, absent: dict[str, str], found: set[int]) -> str:
    """Flags ready to paste, if exactly one column looks like text and one like labels; else general advice."""
    texts, labels = [], []
    has_header = not any(len(name.split()) > 4 or name.startswith("{") for name in table.names)
    for place in range(len(table.names)):
        values = [value for value in _values(table, place)[:SAMPLE] if value not in (None, "")]
        has_header = has_header and table.names[place] not in values
        words = [str(value) for value in values if isinstance(value, str | int)]
        if place in found or not values or len(words) < len(values):
            continue
        if sum(len(word.split()) for word in words) >= 3 * len(words):
            texts.append(table.names[place])
        elif 2 <= len(set(words)) <= min(MOST_LABELS, len(words) - 1) and not any(map(FRACTION.fullmatch, words)):
            labels.append(table.names[place])
            has_header = has_header and table.names[place] not in words
    candidates = {flag: labels if flag == "--label-column" else texts for flag in absent.values()}
    if has_header and all(len(names) == 1 for names in candidates.values()):
        return "try " + " ".join(f"{flag} {shlex.quote(names[0])}" for flag, names in candidates.items())
    if not has_header:
        return "its first line must name the columns, as in text,label"
    if len(absent) == 1:
        return f"name one by {next(iter(absent.values()))}"
    return "name them by --text-column and --label-column, or --prompt-column and --completion-column"


def _values(table: Table, place: int) -> Sequence[Any]:
    """The values of a column.

    Raises:
        FtError: they are damaged, or do not fit into memory.
    """
    try:
        return table.column(place)
    except MemoryError as error:
        raise FtError(
            f"cannot read the column {table.names[place]!r} of {table.path}: it does not fit into memory; split the "
            "file into several"
        ) from error
    except read_errors(ValueError) as error:
        raise FtError(f"cannot read {table.path}: {_first_line(error)}") from error


def _texts(table: Table, place: int, column: str) -> list[str]:
    values = _values(table, place)
    _refuse_missing(table, values, column)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise FtError(f"the {column} in {table.where([row])} is {_shown(value)}, it must be text")
        if not value.isascii():
            require_utf8(value, f"the {column} in {table.where([row])}")
    return list(values)


def _refuse_missing(table: Table, values: Sequence[Any], column: str) -> None:
    rows = [row for row, value in enumerate(values) if value is None]
    if rows:
        raise FtError(
            f"the {column} in {table.where(rows)} is missing; fill it in or leave the row{'s' * (len(rows) > 1)} out"
        )


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    shown = text if len(text) <= 60 else text[:60] + "..."
    return repr(shown) if isinstance(value, str) else shown


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names for a message; of more than `most`, the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name[:60]) for name in names[:most]) + more


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
        raise FtError(f"cannot read {path} as {kind}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
