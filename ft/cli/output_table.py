"""Tables that commands print or write, in the format that the name of the file ends in.

The values of the rows are data: a text that begins with `=` is written as it is, and in CSV a value is quoted if it
holds the delimiter, a quote, a line break, or blanks at an end.
"""

import codecs
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ft.data.table import Table, first_line, read_values
from ft.errors import FtError, one_line, shown
from ft.io.plain_files import atomic_file
from ft.io.standard_streams import print_notes

if TYPE_CHECKING:
    import pyarrow as pa

    from ft.inference.classifier import Prediction

MOST_COLUMNS = 8  # up to this many labels each has a column for its probability
LIKELIEST = 3  # of more labels this many are printed


def new_names(existing: Sequence[str], wanted: Sequence[str], source: str, *, quiet: bool) -> list[str]:
    """Names for columns that are added: those `wanted`, all with `ft_` before them if one of them exists already.

    Args:
        existing: the names of the columns of the source.
        wanted: the names of the columns that are added.
        source: its name, for the note on other names.
        quiet: whether to print no note.
    """
    names = list(wanted)
    while set(names) & set(existing):
        names = [f"ft_{name}" for name in names]
    if names != list(wanted):
        taken = ", ".join(name for name in wanted if name in existing)
        print_notes([f"{source} has {taken} already: the new columns are {', '.join(names)}"], quiet=quiet)
    return names


class TableWriter:
    """Writes rows to a file, in chunks. Parquet is written at the end, as the types of its columns must be known.

    With a `source` its columns come first, unchanged, and each row that is given continues its next row.
    """

    def __init__(self, file: BinaryIO, suffix: str, names: Sequence[str], source: Table | None = None) -> None:
        """Write the header.

        Args:
            file: where to write.
            suffix: one of `OUTPUT_SUFFIXES` in ft/io/paths.py.
            names: the columns that are given to `write`.
            source: a table whose columns come first.
        """
        self._file, self._kind, self._names, self._source = file, suffix, list(names), source
        self._rows: list[Sequence[Any]] = []  # of parquet
        self._done = 0
        self._before: list[Sequence[Any]] = []
        self._delimiter, self._encoding = "\t" if suffix == ".tsv" else ",", "utf-8"
        header = list(names)
        if source is not None:
            header = [*source.names, *header]
            if suffix != ".parquet" or source.arrow is None:
                self._before = [read_values(source, place) for place in range(len(source.names))]
            if source.path.name.lower().removesuffix(".gz").endswith(suffix):
                self._delimiter, self._encoding = source.delimiter, source.encoding
        self._header = header
        self._encoder = codecs.getincrementalencoder(self._encoding)()  # which writes a byte order mark once
        if suffix in (".csv", ".tsv"):
            self._write_text(_csv_line(header, self._delimiter))
        elif suffix == ".json":
            self._write_text("[")

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write the next rows."""
        if self._kind == ".parquet":
            self._rows += rows
            self._done += len(rows)
            return
        lines = []
        for row in rows:
            values = [*(column[self._done] for column in self._before), *row]
            if self._kind in (".csv", ".tsv"):
                lines.append(_csv_line(map(_cell, values), self._delimiter))
            else:
                line = self._json_line(dict(zip(self._header, map(_json_value, values), strict=True)))
                comma = "," if self._done and self._kind == ".json" else ""
                lines.append(f"{comma}\n{line}" if self._kind == ".json" else f"{line}\n")
            self._done += 1
        self._write_text("".join(lines))

    def close(self) -> None:
        """Write what the file needs at its end.

        Raises:
            FtError: a column does not fit one type of parquet.
        """
        if self._kind == ".json":
            self._write_text("\n]\n")
        elif self._kind == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                pq.write_table(self._arrow_table(), self._file)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise FtError(
                    f"the table cannot be written as parquet: {first_line(error)}; name an --output that ends in .jsonl"
                ) from error

    def _write_text(self, text: str) -> None:
        try:
            self._file.write(self._encoder.encode(text))
        except UnicodeEncodeError as error:
            lacking = shown(error.object[error.start : error.end])
            raise FtError(
                f"{lacking} cannot be written in {self._encoding}, the encoding of the input: name an --output that "
                "ends in .jsonl"
            ) from error

    def _json_line(self, row: Mapping[str, Any]) -> str:
        """A row as JSON; where a text does not fit the encoding, such as half of a surrogate pair, all in ASCII."""
        line = json.dumps(row, ensure_ascii=False)
        try:
            line.encode(self._encoding)
        except UnicodeEncodeError:
            return json.dumps(row)
        return line

    def _arrow_table(self) -> "pa.Table":
        import pyarrow as pa

        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._names)
        added = {name: pa.array(values) for name, values in zip(self._names, columns, strict=True)}
        if self._source is None or self._source.arrow is None:
            before = [pa.array(values) for values in self._before]
            return pa.table([*before, *added.values()], names=self._header)
        table = self._source.arrow()
        metadata = _with_features(table.schema.metadata or {}, added)
        for name, array in added.items():
            table = table.append_column(name, array)
        return table.replace_schema_metadata(metadata)


def _with_features(metadata: dict[bytes, bytes], added: "Mapping[str, pa.Array]") -> dict[bytes, bytes]:
    """The metadata of a schema in which the `datasets` library finds the types of the columns, with the added ones."""
    try:
        described = json.loads(metadata[b"huggingface"])
        features = described["info"]["features"]
        features |= {name: {"dtype": str(array.type), "_type": "Value"} for name, array in added.items()}
    except (KeyError, TypeError, ValueError, RecursionError):
        return metadata
    return {**metadata, b"huggingface": json.dumps(described).encode()}


@contextmanager
def open_output(path: Path, names: Sequence[str], source: Table | None = None) -> Iterator[TableWriter]:
    """A `TableWriter` for a file that appears when the context ends without an exception."""
    with atomic_file(path) as file:
        writer = TableWriter(file, path.suffix.lower(), names, source)
        yield writer
        writer.close()


def _csv_line(values: "Iterator[str] | Sequence[str]", delimiter: str) -> str:
    quoted = [
        '"' + value.replace('"', '""') + '"'
        if any(c in value for c in (delimiter, '"', "\n", "\r")) or value != value.strip()
        else value
        for value in values
    ]
    return (delimiter.join(quoted) if quoted != [""] else '""') + "\n"


def _cell(value: object) -> str:
    """A value as text: nothing for a missing one, numbers with all their digits, and lists as JSON."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict):
        return json.dumps(_json_value(value))
    return str(value)


def _json_value(value: object) -> object:
    """A value that JSON has, also inside lists and objects; NaN is null, and dates and bytes are text."""
    if isinstance(value, dict):
        return {key: _json_value(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


class ConsoleTable:
    """Prints a line for each example: its label, and the probability of each label, or of the most probable of many."""

    def __init__(self, names: Sequence[str]) -> None:
        self._few = len(names) <= MOST_COLUMNS
        self._header = ["label", *([one_line(name) for name in names] if self._few else ["most probable"])]
        self._widths: list[int] = []  # of the first chunk, also for those after it

    def print(self, texts: Sequence[str | None], predictions: "Sequence[Prediction | None]") -> None:
        """Print the next examples."""
        rows = [] if self._widths else [(self._header, "text")]
        for text, prediction in zip(texts, predictions, strict=True):
            if prediction is None:
                cells = [""] * len(self._header)
            elif self._few:
                cells = [one_line(prediction.label), *(f"{value:.2%}" for value in prediction.probabilities.values())]
            else:
                ranked = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])[:LIKELIEST]
                likeliest = ", ".join(f"{one_line(name)} {value:.2%}" for name, value in ranked)
                cells = [one_line(prediction.label), likeliest]
            rows.append((cells, one_line(text or "", 80)))
        self._widths = self._widths or [
            max(map(len, column)) for column in zip(*(cells for cells, _ in rows), strict=True)
        ]
        align = ">" if self._few else "<"
        for (label, *values), text in rows:
            aligned = [f"{cell:{align}{width}}" for cell, width in zip(values, self._widths[1:], strict=True)]
            print("  ".join([label.ljust(self._widths[0]), *aligned, text]))
        sys.stdout.flush()
