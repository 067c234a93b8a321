"""Tables in JSON files: lines of objects, an array of objects, or an object of columns, also compressed by gzip.

The standard library parses them: PyArrow's JSON reader crashes on some malformed lines.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft.data.table import Table
from ft.data.text_files import TextFormat, decoded, plain_lines, read_bytes
from ft.errors import FtError


def read_json_table(path: Path, wanted: Sequence[str], form: TextFormat) -> Table:
    """Read JSON lines, or one JSON value in any layout that `pandas.DataFrame.to_json` writes and that has names.

    Args:
        path: the file.
        wanted: the columns to read, by which rows are recognized.
        form: the encoding, if the user names it.

    Raises:
        FtError: it is not a table.
        UsageError: there is no such encoding.
    """
    text = decoded(read_bytes(path), str(path), form.encoding)
    lines: list[int] | None
    try:
        content = json.loads(text)
        rows = content if isinstance(content, list) else _rows_of(path, content, wanted)
        lines = [1] if len(rows) == 1 and rows[0] is content else None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise FtError(f"cannot read {path}: {_json_problem(error)}") from error
        numbered = [(number, line) for number, line in enumerate(plain_lines(text), start=1) if line.strip()]
        lines = [number for number, _ in numbered]
        rows = [_parse_line(path, number, line) for number, line in numbered]
    for row, values in enumerate(rows):
        if not isinstance(values, dict):
            place = f"row {row}" if lines is None else f"line {lines[row]:,}"
            shown = json.dumps(values)[:40]
            raise FtError(f'{place} of {path} is {shown}, it must be an object such as {{"text": "...", "label": 1}}')
    if not rows:
        raise FtError(f"{path} is empty: it must hold an object per row")
    names = list(dict.fromkeys(name for values in rows for name in values))
    return Table(path, names, lambda place: [values.get(names[place]) for values in rows], lines)


def _parse_line(path: Path, number: int, line: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path}: {_json_problem(error, number)}") from error


def _json_problem(error: Exception, line: int | None = None) -> str:
    """The problem in words; of a file of JSON lines, `line` is the number of the line that was parsed."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON in line {line or error.lineno:,}, column {error.colno:,}: {error.msg}"
    place = "" if line is None else f" in line {line:,}"
    return f"JSON{place} is nested too deeply" if isinstance(error, RecursionError) else f"invalid JSON{place}: {error}"


def _rows_of(path: Path, content: Any, wanted: Sequence[str]) -> list[Any]:  # noqa: ANN401
    """The rows of a file that is one JSON value: a single row, rows under `data`, rows by their index, or columns."""
    if not isinstance(content, dict):
        return [content]
    if isinstance(rows := content.get("data"), list) and not set(wanted) <= content.keys():
        names = content.get("columns")  # of `orient="split"`, whose rows are arrays
        if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            return [dict(zip(map(str, names), row, strict=True)) for row in rows]
        return list(rows)
    if content and all(isinstance(row, dict) and set(wanted) <= row.keys() for row in content.values()):
        return list(content.values())  # of `orient="index"`
    columns = {name: list(v.values()) if isinstance(v, dict) else v for name, v in content.items()}
    if not columns or not all(isinstance(values, list) for values in columns.values()):
        return [content]
    if len({len(values) for values in columns.values()}) > 1:
        raise FtError(f"cannot read {path}: its columns have different lengths")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
