"""Tables in text files: CSV, TSV, JSON and JSON lines, each also compressed by gzip; and plain lines of text.

The standard library reads them: PyArrow's JSON reader crashes on some broken lines, and its CSV reader joins rows where
a value begins with a lone quote.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ft.data.table import Table
from ft.errors import FtError, UsageError

DELIMITERS = ",;\t|"  # those that are recognized; --delimiter names any other
LARGEST_VALUE = 2**26  # characters of a value in a CSV file
BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
BINARY = {  # how files begin that are not text, but would be some in cp1252
    b"PK\x03\x04": "a ZIP archive or an Excel workbook: save its table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save its table as CSV",
    b"BZh": "compressed by bzip2: decompress it",
    b"\x1f\x8b": "compressed by gzip: let its name end in .gz, such as .csv.gz",
    b"PAR1": "a parquet file: let its name end in .parquet",
}
# A text whose every quote opens, closes or is doubled in a quoted value, as CSV writers leave it.
WELL_QUOTED = r'(?:(?:"(?:[^"]|"")*+"|[^"{d}\r\n]*+)(?:[{d}\r\n]|$))*+'


class TextFormat(NamedTuple):
    """What a text file does not say of itself; None: found from its beginning."""

    delimiter: str | None = None
    encoding: str | None = None


class _MalformedError(Exception):
    """A text is no table when read in one of several ways."""


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where its name ends in .gz.

    Raises:
        OSError: it cannot be read, or is not compressed.
        FtError: it is cut off or damaged.
    """
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error) as error:
        raise FtError(f"cannot read {path}: it is damaged or cut off ({error})") from error


def decoded(content: bytes, name: str, encoding: str | None) -> str:
    """The characters of a file: by its byte order mark, else in `encoding`, else in UTF-8.

    Raises:
        FtError: it is in another encoding, or no text.
        UsageError: there is no such encoding.
    """
    for beginning, what in BINARY.items():
        if content.startswith(beginning) and b"\0" in content[:4096]:
            raise FtError(f"{name} is {what}")
    for mark, marked in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], marked
    try:
        text = content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FtError(
            f"{name} is not {encoding or 'UTF-8'}: {error.reason} in line {line:,}, byte {error.start:,}; name its "
            "encoding, such as --encoding cp1252 for files of Windows programs, or save it as UTF-8"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise UsageError(f"--encoding is {encoding!r}, it must be an encoding of text, such as cp1252") from error
    if "\0" in text[:100]:
        raise FtError(f"{name} holds NUL characters: try --encoding utf-16-le, or save it as UTF-8")
    return text


def plain_lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n or \r and nowhere else: a form feed or U+2028 is part of one."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The names in the first line, the rows, and the line in which each row begins."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_csv_table(path: Path, wanted: Sequence[str], form: TextFormat) -> Table:
    """A CSV or TSV file; every value is the text that it is, be it 2001 or NA.

    Args:
        path: the file.
        wanted: columns that tell the right delimiter and quoting from others; the last may be that of labels, which
            tell rows from lines of a text.
        form: the delimiter and encoding where the user names them.

    Raises:
        FtError: it is no table.
        UsageError: the delimiter is not one character, or there is no such encoding.
    """
    text = decoded(read_bytes(path), str(path), form.encoding)
    if not text.strip():
        raise FtError(f"{path} is empty: its first line must name the columns")
    usual = "\t" if ".tsv" in path.name.lower() else ","
    if said := re.match(r"sep=(.)\r?\n", text):  # with which Excel is told the delimiter
        text, usual = "\n" + text[said.end() :], said[1]
    delimiter = _delimiter(text, wanted, usual, form.delimiter)
    notes = [] if form.delimiter or delimiter == usual else [f"the columns of {path.name} are split at {delimiter!r}"]
    found = _best_reading(path, text, delimiter, wanted, notes)
    rows, lines = found.rows, found.lines
    filled = [row for row, values in enumerate(rows) if any(values)]
    if len(filled) < len(rows):
        notes.append(f"{len(rows) - len(filled):,} rows of {path.name} without any value are left out")
        rows, lines = [rows[row] for row in filled], [lines[row] for row in filled]
    kept = [row for row, values in enumerate(rows) if values != found.names]
    if len(kept) < len(rows):  # as files with a header each leave them when joined
        notes.append(f"{len(rows) - len(kept):,} rows of {path.name} that repeat the names of its columns are left out")
        rows, lines = [rows[row] for row in kept], [lines[row] for row in kept]
    columns = list(zip(*rows, strict=True)) or [()] * len(found.names)
    return Table(path, found.names, columns.__getitem__, lines, notes=tuple(notes))


def _delimiter(text: str, wanted: Sequence[str], usual: str, given: str | None) -> str:
    """What splits the first line into the columns that are wanted, else into most columns."""
    if given is not None:
        delimiter = {"tab": "\t", "\\t": "\t"}.get(given.lower(), given)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise UsageError(f"--delimiter is {given!r}, it must be one character, such as ';', or tab")
        return delimiter
    first = plain_lines(text.lstrip("\r\n")[: 2**16])[0]
    names = {d: [name.strip(' "') for name in first.split(d)] for d in dict.fromkeys([usual, *DELIMITERS])}
    fitting = [d for d in names if set(wanted) <= set(names[d])]
    return fitting[0] if fitting else max(names, key=lambda d: len(names[d]))


def _best_reading(path: Path, text: str, delimiter: str, wanted: Sequence[str], notes: list[str]) -> _Rows:
    """The rows by the first way of quoting that makes a table of the text.

    Tab-separated values are quoted only where the file doubles quotes or is no table without: programs that write such
    files often join values by tabs and leave quotes as they are. Other files are quoted unless that makes no table.
    """
    quoted = ("", lambda: _quoted(text, delimiter))
    as_they_are = ("", lambda: _unquoted(text, delimiter))
    escaped = (rf"the quotes in {path.name} are escaped as \"", lambda: _escaped(text, delimiter))
    lone = (f"the quotes in {path.name} do not enclose values and are read as parts of them", as_they_are[1])
    if delimiter == "\t":
        ways = [quoted, as_they_are] if _doubles_quotes(text, delimiter) else [as_they_are, quoted]
    else:
        is_escaped = any("\\" + character in text for character in ('"', delimiter))
        ways = [quoted, escaped, lone] if is_escaped else [quoted, lone]
    found: _Rows | None = None
    failure: Exception | None = None
    for note, way in ways:
        try:
            rows = _table_of(way())
        except _MalformedError as error:
            failure = failure or error
            continue
        except FtError as error:
            raise FtError(f"cannot read {path}: {error}") from error
        has_wanted = set(wanted) <= {name.strip() for name in rows.names}
        if found is None or has_wanted:
            found, how, said = rows, way, note
        if has_wanted:
            break
    if found is None:
        raise FtError(f"cannot read {path}: {failure}") from failure
    notes += [said] if said else []
    if how is not as_they_are[1]:
        _see_to_long_rows(path, text, delimiter, found, wanted, notes)
    return found


def _doubles_quotes(text: str, delimiter: str) -> bool:
    """Whether all quotes are as a CSV writer leaves them, and one of them is doubled inside a value."""
    if '""' not in text or not re.fullmatch(WELL_QUOTED.replace("{d}", delimiter), text):
        return False
    return any('"' in value for _, row in _quoted(text, delimiter) for value in row)


def _escaped(text: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    r"""The rows of a text in which \ escapes quotes, delimiters and itself; before anything else it is a character."""
    doubled = re.sub(rf'(\\["\\{re.escape(delimiter)}])|\\', lambda found: found[1] or r"\\", text)
    return _quoted(doubled, delimiter, escape="\\")


def _quoted(text: str, delimiter: str, escape: str | None = None) -> Iterable[tuple[int, list[str]]]:
    """The rows of a text with quoted values, each with the line it begins in."""
    before = csv.field_size_limit(LARGEST_VALUE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, escapechar=escape, strict=True)
    begin = 1
    try:
        for row in reader:
            yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        if "limit" in str(error):
            raise FtError(
                f"line {begin:,} holds a value of more than {LARGEST_VALUE:,} characters: is a quote never closed?"
            ) from error
        raise _MalformedError(
            f"line {reader.line_num:,} has a quote that neither ends a value nor is doubled"
            if "expected after" in str(error)
            else f"the row that begins in line {begin:,} is not whole ({error})"
        ) from error
    finally:
        csv.field_size_limit(before)


def _unquoted(text: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    """The rows of a text in which a quote is a character like others, each with its line."""
    lines = text.split("\n" if "\n" in text else "\r")
    for number, line in enumerate(lines, start=1):
        if content := line.removesuffix("\r"):
            yield number, content.split(delimiter)


def _table_of(numbered: Iterable[tuple[int, list[str]]]) -> _Rows:
    """Rows of as many values as the first; in all others a last empty one may be too many."""
    filled = [(line, row) for line, row in numbered if row]
    (_, names), *rest = filled
    width = len(names)
    if rest and all(len(row) == width + 1 and row[-1] == "" for _, row in rest):  # each ends in a delimiter
        rest = [(line, row[:-1]) for line, row in rest]
    for line, row in rest:
        if len(row) != width:
            raise _MalformedError(
                f"line {line:,} has {len(row)} values and the first line {width}; put quotes around values that hold "
                f"the delimiter, or name another delimiter by --delimiter"
            )
    return _Rows(names, [row for _, row in rest], [line for line, _ in rest])


def _see_to_long_rows(
    path: Path, text: str, delimiter: str, found: _Rows, wanted: Sequence[str], notes: list[str]
) -> None:
    """Note that rows span several lines, and refuse one whose every line looks like a row of its own.

    A line looks like one if it has as many values, and as label one that rows of a single line have.
    """
    if text.count("\n") + text.count("\r") <= len(found.rows):  # fewer than lines, as there is a first one
        return
    long = [row for row, values in enumerate(found.rows) if any("\n" in value or "\r" in value for value in values)]
    if not long:
        return
    lines = plain_lines(text)
    notes.append(f"{path.name} has {len(found.rows):,} rows in {len(lines):,} lines, as some values span several")
    places = [place for place, name in enumerate(found.names) if name.strip() == wanted[-1]]
    if len(wanted) < 2 or not places:
        return
    short = set(range(len(found.rows))).difference(long)
    labels = {found.rows[row][places[0]] for row in short}
    for row in long:
        begin, end = found.lines[row], [*found.lines, len(lines) + 1][row + 1] - 1
        inside = [line.split(delimiter) for line in lines[begin - 1 : end] if line]
        if all(len(values) == len(found.names) and values[places[0]] in labels for values in inside):
            raise FtError(
                f"lines {begin:,} to {end:,} of {path} are one row, as a quote opens in the first and closes in the "
                "last, yet each looks like a row: double the quotes inside values, or save the file as JSON lines"
            )


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json_table(path: Path, wanted: Sequence[str], form: TextFormat) -> Table:
    """A file of JSON lines, an array of objects, or one object of columns as `pandas.DataFrame.to_json` writes it.

    Raises:
        FtError: it is no table.
        UsageError: there is no such encoding.
    """
    text = decoded(read_bytes(path), str(path), form.encoding)
    lines: list[int] | None
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else _rows_of(path, whole, wanted)
        lines = [1] if len(rows) == 1 and rows[0] is whole else None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise FtError(f"cannot read {path}: {_reason(error)}") from error
        numbered = [(number, line) for number, line in enumerate(plain_lines(text), start=1) if line.strip()]
        lines = [number for number, _ in numbered]
        rows = [_value(path, number, line) for number, line in numbered]
    for row, values in enumerate(rows):
        if not isinstance(values, dict):
            place = f"row {row}" if lines is None else f"line {lines[row]:,}"
            shown = json.dumps(values)[:40]
            raise FtError(f'{place} of {path} is {shown}, it must be an object such as {{"text": "...", "label": 1}}')
    if not rows:
        raise FtError(f"{path} is empty: it must hold an object per row")
    names = list(dict.fromkeys(name for values in rows for name in values))
    return Table(path, names, lambda place: [values.get(names[place]) for values in rows], lines)


def _value(path: Path, number: int, line: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path}: in line {number:,} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"JSON is broken off or wrong: {error.msg} (line {error.lineno}, column {error.colno})"
    return "JSON is nested too deeply" if isinstance(error, RecursionError) else f"JSON is wrong: {error}"


def _by_name(names: Any, rows: list[Any]) -> list[Any]:  # noqa: ANN401
    """Rows as objects; with `orient="split"` pandas writes lists of values, and the names of the columns beside."""
    if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return [dict(zip(map(str, names), row, strict=True)) for row in rows]
    return rows


def _rows_of(path: Path, whole: Any, wanted: Sequence[str]) -> list[Any]:  # noqa: ANN401
    """The rows of an object that is a whole file: one row, the rows under `data`, or columns of values by row."""
    if not isinstance(whole, dict):
        return [whole]
    if isinstance(whole.get("data"), list) and not set(wanted) <= whole.keys():
        return _by_name(whole.get("columns"), whole["data"])
    rows = list(whole.values())
    if all(isinstance(values, dict) and set(wanted) <= values.keys() for values in rows):  # orient="index" of pandas
        return rows
    columns = {name: list(v.values()) if isinstance(v, dict) else v for name, v in whole.items()}
    if not columns or not all(isinstance(values, list) for values in columns.values()):
        return [whole]
    if len({len(values) for values in columns.values()}) > 1:
        raise FtError(f"cannot read {path}: its columns have different lengths")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
