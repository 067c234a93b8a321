"""A table as read from a file of any format, its columns, and the places of its rows."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ft.errors import FtError, UsageError, printable, quoted

if TYPE_CHECKING:
    import pyarrow as pa

FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")
SAMPLE = 1000  # rows by which columns of text and of labels are recognized
MOST_LABELS = 100  # distinct values of a column that is taken for labels


class NoLabelsError(FtError):
    """The split exists, but has no labels."""


class NoLabelColumnError(NoLabelsError, UsageError):
    """The split exists, but has no column of the given name for its labels."""


class FileRows(NamedTuple):
    """The rows of one file of a split.

    Attributes:
        path: the file.
        num_rows: the number of its rows.
        lines: the line in which each row begins, from 1; None if the format has no lines.
    """

    path: Path
    num_rows: int
    lines: Sequence[int] | None

    def where(self, rows: Sequence[int]) -> str:
        """Describe rows for a message: `row 3 of x.csv (line 5)`, or for several their count and the first ten."""
        in_lines = "" if self.lines is None else f" (line {self.lines[rows[0]]:,})"
        if len(rows) == 1:
            return f"row {rows[0]} of {self.path}{in_lines}"
        kind, numbers = ("rows", rows) if self.lines is None else ("lines", [self.lines[row] for row in rows])
        more = ", ..." if len(rows) > 10 else ""
        return f"{len(rows):,} rows of {self.path} ({kind} {', '.join(map(str, numbers[:10]))}{more})"


class Place(NamedTuple):
    """A row in its file; `row` is counted from 0 and `line` from 1, None if the format has no lines."""

    path: Path
    row: int
    line: int | None


def place_in_files(files: Sequence[FileRows], row: int) -> Place:
    """The place of a row that is numbered from 0 over all files."""
    for file in files:
        if row < file.num_rows:
            return Place(file.path, row, None if file.lines is None else file.lines[row])
        row -= file.num_rows
    raise IndexError(row)


def where_in_files(files: Sequence[FileRows], rows: Sequence[int]) -> str:
    """Describe rows that are numbered from 0 over all files, by file."""
    parts, first = [], 0
    for file in files:
        inside = [row - first for row in rows if first <= row < first + file.num_rows]
        parts += [file.where(inside)] if inside else []
        first += file.num_rows
    return " and ".join(parts)


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Attributes:
        path: the file.
        names: the names of all columns.
        column: a function from a column's index to its values, which it reads.
        lines: the line in which each row begins, from 1; None if the format has no lines.
        metadata: the metadata of the file's Arrow schema.
        arrow: a function that reads all columns of an Arrow or parquet file, with their types; None for other formats.
        delimiter: that of a CSV or TSV file.
        encoding: Python's name of the encoding of a text file, byte order mark included.
        notes: notes for the user on how the file is read, a sentence each.
    """

    path: Path
    names: Sequence[str]
    column: Callable[[int], Sequence[Any]]
    lines: Sequence[int] | None = None
    metadata: dict[bytes, bytes] | None = None
    arrow: "Callable[[], pa.Table] | None" = None
    delimiter: str = ","
    encoding: str = "utf-8"
    notes: tuple[str, ...] = ()

    def where(self, rows: Sequence[int]) -> str:
        """Describe rows for a message: see `FileRows.where`."""
        return FileRows(self.path, 0, self.lines).where(rows)


def find_columns(table: Table, flags: dict[str, str]) -> list[int]:
    """The indices of the columns named by the keys of `flags`, ignoring blanks around names.

    Raises:
        NoLabelColumnError: only the target column is missing.
        UsageError: another column is missing.
        FtError: several columns have the name.
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
        error = NoLabelColumnError if absent == list(flags)[1:] else UsageError
        raise error(message + _advice_on_columns(table, {name: flags[name] for name in absent}, set(found.values())))
    return list(found.values())


def _advice_on_columns(table: Table, absent: dict[str, str], found: set[int]) -> str:
    """Flags ready to paste, if exactly one column looks like text and one like labels; else general advice."""
    texts, labels = [], []
    has_header = not any(len(name.split()) > 4 or name.startswith("{") for name in table.names)
    for place in range(len(table.names)):
        values = [value for value in read_values(table, place)[:SAMPLE] if value not in (None, "")]
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
        return "try " + " ".join(f"{flag} {quoted(names[0])}" for flag, names in candidates.items())
    if not has_header:
        return "its first line must name the columns, as in text,label"
    if len(absent) == 1:
        return f"name one by {next(iter(absent.values()))}"
    return "name them by --text-column and --label-column, or --prompt-column and --completion-column"


def read_values(table: Table, place: int) -> Sequence[Any]:
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
        raise FtError(f"cannot read {table.path}: {first_line(error)}") from error


def shown_value(value: object) -> str:
    """A value of a table as a message quotes it, shortened at the end."""
    text = value if isinstance(value, str) else repr(value)
    shown = text if len(text) <= 60 else text[:60] + "..."
    return repr(shown) if isinstance(value, str) else shown


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names for a message; of more than `most`, the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name[:60]) for name in names[:most]) + more


def read_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions of reading a file: `OSError`, `others`, and those of PyArrow if it is imported."""
    pyarrow = sys.modules.get("pyarrow")
    return (OSError, *others) if pyarrow is None else (OSError, *others, pyarrow.ArrowException)


def first_line(error: Exception) -> str:
    """The message of an error of the system or of a library, without its details."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
