"""Text files: their encoding, plain lines, and tables in CSV and TSV, also compressed by gzip.

The standard library parses them: PyArrow's CSV reader joins rows if a value begins with an unmatched quote.
"""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

from ft.data.table import Table
from ft.errors import FtError, UsageError, counted

DELIMITERS = ",;\t|"  # those that are detected; --delimiter names any other
LARGEST_VALUE = 2**26  # characters of a value in a CSV file
# How files begin that have a text file's name and are something else.
BINARY_SIGNATURES = {
    b"PK\x03\x04": "a ZIP archive, as Excel workbooks are: save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save the table as CSV",
    b"BZh": "compressed by bzip2: decompress it",
    b"\x1f\x8b": "compressed by gzip: add .gz to its name",
    b"PAR1": "a parquet file: name it .parquet",
}
BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# A text in which each quote opens or closes a quoted value, or is doubled inside one, as CSV writers write them.
WELL_QUOTED = r'(?:(?:"(?:[^"]|"")*+"|[^"{d}\r\n]*+)(?:[{d}\r\n]|$))*+'


class TextFormat(NamedTuple):
    """The delimiter and encoding of a text file; None to detect them."""

    delimiter: str | None = None
    encoding: str | None = None


class _MalformedError(Exception):
    """The text is not a table under one of several quoting rules."""


def read_bytes(path: Path) -> bytes:
    """Read a file, and decompress it if its name ends in .gz.

    Raises:
        OSError: it cannot be read, or is not compressed.
        FtError: it is truncated or damaged.
    """
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error) as error:
        raise FtError(f"cannot read {path}: it is damaged or truncated ({error})") from error


def encoding_of(content: bytes, encoding: str | None) -> str:
    """Python's name of the encoding that `decoded` uses; what is written in it begins with the same byte order mark."""
    marked = {"utf-8": "utf-8-sig", "utf-16-le": "utf-16", "utf-16-be": "utf-16"}
    mark = next((kind for mark, kind in BYTE_ORDER_MARKS if content.startswith(mark)), None)
    return marked[mark] if mark else encoding or "utf-8"


def decoded(content: bytes, name: str, encoding: str | None, *, lines_before: int = 0) -> str:
    """Decode the content of a file: by its byte order mark, else in `encoding`, else as UTF-8.

    Args:
        content: the bytes.
        name: the file, for messages.
        encoding: the encoding that the user names.
        lines_before: lines of the file before `content`, for messages.

    Raises:
        FtError: the content is in another encoding, or is not text.
        UsageError: there is no such encoding.
    """
    for signature, kind in BINARY_SIGNATURES.items():
        if content.startswith(signature) and b"\0" in content[:4096]:
            raise FtError(f"{name} is {kind}")
    for mark, mark_encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], mark_encoding
    try:
        text = content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        byte = error.start - (content.rfind(b"\n", 0, error.start) + 1 if lines_before else 0)
        raise FtError(
            f"{name} is not {encoding or 'UTF-8'}: {error.reason} in line {line:,}, byte {byte:,}; name its "
            "encoding, such as --encoding cp1252 for files of Windows programs, or save it as UTF-8"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise UsageError(f"--encoding is {encoding!r}, it must be an encoding of text, such as cp1252") from error
    if 4 * text[:100].count("\0") > len(text[:100]):  # as in UTF-16, where every second byte of ASCII is 0
        raise FtError(f"{name} holds NUL characters: try --encoding utf-16-le, or save it as UTF-8")
    return text


def plain_lines(text: str) -> list[str]:
    r"""Split a text at \n, \r\n and \r only: form feeds and U+2028 are part of a line."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The column names, the rows, and the line in which each row begins."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_csv_table(path: Path, wanted: Sequence[str], form: TextFormat) -> Table:
    """Read a CSV or TSV file; all values are text, 2001 and NA too.

    Args:
        path: the file.
        wanted: columns by which delimiter and quoting are detected: the reading that has them is right. The last may be
            the label column, whose values distinguish rows from lines of a text.
        form: the delimiter and encoding, if the user names them.

    Raises:
        FtError: it is not a table.
        UsageError: the delimiter is not one character, or there is no such encoding.
    """
    content = read_bytes(path)
    text = decoded(content, str(path), form.encoding)
    if not text.strip():
        raise FtError(f"{path} is empty: its first line must name the columns")
    default = "\t" if ".tsv" in path.name.lower() else ","
    if separator_line := re.match(r"sep=(.)\r?\n", text):  # a first line that names the delimiter to Excel
        text, default = "\n" + text[separator_line.end() :], separator_line[1]
    delimiter = _detect_delimiter(text, wanted, default, form.delimiter)
    notes = [] if form.delimiter or delimiter == default else [f"the columns of {path.name} are split at {delimiter!r}"]
    found = _best_reading(path, text, delimiter, wanted, notes)
    rows, lines = found.rows, found.lines
    for what, is_row in (
        # In a table of one column it is an empty value.
        ("without any value", lambda values: any(values) or len(values) == 1),
        # Files with a header each have it again when they are joined.
        ("with the names of the columns again", lambda values: values != found.names),
    ):
        kept = [row for row, values in enumerate(rows) if is_row(values)]
        if left_out := len(rows) - len(kept):
            are = "is" if left_out == 1 else "are"
            notes.append(f"{counted(left_out, 'row')} of {path.name} {what} {are} left out")
            rows, lines = [rows[row] for row in kept], [lines[row] for row in kept]
    columns = list(zip(*rows, strict=True)) or [()] * len(found.names)
    encoding = encoding_of(content, form.encoding)
    return Table(
        path, found.names, columns.__getitem__, lines, delimiter=delimiter, encoding=encoding, notes=tuple(notes)
    )


def _detect_delimiter(text: str, wanted: Sequence[str], default: str, given: str | None) -> str:
    """The delimiter that splits the first line into the wanted columns, else into the most columns."""
    if given is not None:
        delimiter = {"tab": "\t", "\\t": "\t"}.get(given.lower(), given)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise UsageError(f"--delimiter is {given!r}, it must be one character, such as ';', or tab")
        return delimiter
    first = plain_lines(text.lstrip("\r\n")[: 2**16])[0]
    names = {d: [name.strip(' "') for name in first.split(d)] for d in dict.fromkeys([default, *DELIMITERS])}
    fitting = [d for d in names if set(wanted) <= set(names[d])]
    return fitting[0] if fitting else max(names, key=lambda d: len(names[d]))


def _best_reading(path: Path, text: str, delimiter: str, wanted: Sequence[str], notes: list[str]) -> _Rows:
    """The rows under the first quoting rule that yields a table with the wanted columns, else the first table.

    TSV is read without quoting first, unless the file doubles quotes: programs often join values by tabs and leave
    quotes as they are. Other formats are read with quoting first.
    """
    quoted = ("", lambda: _quoted(text, delimiter))
    literal = ("", lambda: _unquoted(text, delimiter))
    escaped = (rf"the quotes in {path.name} are escaped as \"", lambda: _escaped(text, delimiter))
    spaced = (f"blanks around quotes in {path.name} are left out", lambda: _quoted_with_blanks(text, delimiter))
    unmatched = (f"the quotes in {path.name} do not enclose values and are read as parts of them", literal[1])
    if delimiter == "\t":
        readings = [quoted, literal] if _doubles_quotes(text, delimiter) else [literal, quoted]
    else:
        is_escaped = any("\\" + character in text for character in ('"', delimiter))
        readings = [quoted, *([escaped] if is_escaped else []), spaced, unmatched]
    found: _Rows | None = None
    failure: Exception | None = None
    for note, read in readings:
        try:
            rows = _check_widths(read())
        except _MalformedError as error:
            failure = failure or error
            continue
        except FtError as error:
            raise FtError(f"cannot read {path}: {error}") from error
        has_wanted = set(wanted) <= {name.strip() for name in rows.names}
        if found is None or has_wanted:
            found, found_by, found_note = rows, read, note
        if has_wanted:
            break
    if found is None:
        raise FtError(f"cannot read {path}: {failure}") from failure
    notes += [found_note] if found_note else []
    if found_by is not literal[1]:
        _check_multiline_rows(path, text, delimiter, found, wanted, notes)
    return found


def _doubles_quotes(text: str, delimiter: str) -> bool:
    """Whether the text is quoted as by a CSV writer, with a doubled quote inside a value."""
    if '""' not in text or not re.fullmatch(WELL_QUOTED.replace("{d}", delimiter), text):
        return False
    return any('"' in value for _, row in _quoted(text, delimiter) for value in row)


def _quoted_with_blanks(text: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    """Yield rows as `_quoted` does, without the blanks between quotes and delimiters, as in `1, "a, b" ,2`."""
    return _quoted(re.sub(rf'" +(?=[{re.escape(delimiter)}\r\n]|$)', '"', text), delimiter, skip_blanks=True)


def _escaped(text: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    r"""Yield the rows of a text in which a backslash escapes quotes, delimiters and itself, and nothing else."""
    doubled = re.sub(rf'(\\["\\{re.escape(delimiter)}])|\\', lambda found: found[1] or r"\\", text)
    return _quoted(doubled, delimiter, escape="\\")


def _quoted(
    text: str, delimiter: str, *, escape: str | None = None, skip_blanks: bool = False
) -> Iterable[tuple[int, list[str]]]:
    """Yield the rows of a text with quoted values, each with the line in which it begins; of a blank line no value."""
    old_limit = csv.field_size_limit(LARGEST_VALUE)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        escapechar=escape,
        skipinitialspace=skip_blanks,
        strict=True,
    )
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
            else f"the row that begins in line {begin:,} is not complete ({error})"
        ) from error
    finally:
        csv.field_size_limit(old_limit)


def _unquoted(text: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    """Yield the rows of a text in which quotes have no meaning, each with its line; of a blank line no value."""
    lines = text.split("\n" if "\n" in text else "\r")
    for number, line in enumerate(lines, start=1):
        content = line.removesuffix("\r")
        yield number, content.split(delimiter) if content else []


def _check_widths(numbered: Iterable[tuple[int, list[str]]]) -> _Rows:
    """The rows, if all have as many values as the first; all but the first may have one empty value more at the end.

    A line of blanks is not a row of a table of several columns. In a table of one column it is one, as for pandas with
    `skip_blank_lines=False`, except at the end of the file.
    """
    (_, names), *rest = dropwhile(lambda row: not row[1], numbered)
    width = len(names)
    if width > 1:
        rest = [(line, row) for line, row in rest if len(row) > 1 or any(map(str.strip, row))]
    while rest and not rest[-1][1]:
        rest.pop()
    filled = [row for _, row in rest if row]
    if filled and all(len(row) == width + 1 and row[-1] == "" for row in filled):  # each line ends in a delimiter
        rest = [(line, row[:width]) for line, row in rest]
    rest = [(line, row or [""]) for line, row in rest]
    for line, row in rest:
        if len(row) != width:
            raise _MalformedError(
                f"line {line:,} has {counted(len(row), 'value')} and the first line {width}; put quotes around values "
                "that hold the delimiter or a line break, or name another delimiter by --delimiter"
            )
    return _Rows(names, [row for _, row in rest], [line for line, _ in rest])


def _check_multiline_rows(
    path: Path, text: str, delimiter: str, found: _Rows, wanted: Sequence[str], notes: list[str]
) -> None:
    """Note that rows span several lines, and refuse a row of which each line looks like a row.

    A line looks like a row if it has as many values and its label is also that of a single-line row.
    """
    if text.count("\n") + text.count("\r") <= len(found.rows):  # the first line holds the names
        return
    multiline = [
        row for row, values in enumerate(found.rows) if any("\n" in value or "\r" in value for value in values)
    ]
    if not multiline:
        return
    lines = plain_lines(text)
    rows = counted(len(found.rows), "row")
    notes.append(f"{path.name} has {rows} in {len(lines):,} lines, as some values span several")
    label_columns = [index for index, name in enumerate(found.names) if name.strip() == wanted[-1]]
    if len(wanted) < 2 or not label_columns:
        return
    label_column = label_columns[0]
    labels = {found.rows[row][label_column] for row in set(range(len(found.rows))).difference(multiline)}
    for row in multiline:
        begin, end = found.lines[row], [*found.lines, len(lines) + 1][row + 1] - 1
        split_lines = [line.split(delimiter) for line in lines[begin - 1 : end] if line]
        if all(len(values) == len(found.names) and values[label_column] in labels for values in split_lines):
            raise FtError(
                f"lines {begin:,} to {end:,} of {path} are one row, as a quote opens in the first and closes in the "
                "last, yet each looks like a row: double the quotes inside values, or save the file as JSON lines"
            )
