"""Rows from files: parquet, CSV, TSV and JSON lines, the last three also compressed by gzip. PyArrow reads them all."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ft.data.splits import Split
from ft.errors import FtError
from ft.io.formats import suffix_of

if TYPE_CHECKING:
    import pyarrow as pa


LARGEST_ROW = 2**26  # bytes: PyArrow reads text files in blocks, and a row must fit into one
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


class Columns(NamedTuple):
    """Which columns are read: a text and its label, or with `completion` a prompt and what should follow it."""

    text: str = "text"
    label: str = "label"
    completion: str | None = None

    @property
    def answer(self) -> str:
        """The column of what the model should say."""
        return self.label if self.completion is None else self.completion


def read_split(
    name: str, paths: Sequence[Path], columns: Columns | None = None, label_names: Sequence[str] | None = None
) -> Split:
    """Read the rows of a split from its files.

    Labels are whole numbers, or words, which become numbers: their places in `label_names`, or where none are given in
    the sorted list of all words there are. Whole numbers written as text count as numbers, but as words where all of
    them are among `label_names`.

    Raises:
        FtError: a file cannot be read, a column is missing or of another type, a value is null, a label is empty or
            not among the names.
    """
    columns = columns or Columns()
    wanted = (columns.text, columns.answer)
    texts: list[str] = []
    answers: list[str | int] = []
    told_names: tuple[str, ...] | None = None
    for path in paths:
        table = _read(path, wanted)
        texts += _texts(table, columns.text, path)
        if columns.completion is None and not _is_text(table.schema.field(columns.label).type):
            answers += _whole_numbers(table, columns.label, path)
            told_names = told_names or _names_in_metadata(table.schema.metadata, columns.label)
        else:
            answers += _texts(table, columns.answer, path)
    if not texts:
        raise FtError(f"the {name} split has no rows ({', '.join(map(str, paths))})")
    if columns.completion is not None:
        return Split(name, texts, [0] * len(texts), completions=[str(answer) for answer in answers])
    labels, names = _numbered(name, answers, label_names, told_names, columns.label)
    return Split(name, texts, labels, names or told_names, in_words=names is not None)


def read_texts(path: Path, column: str) -> list[str]:
    """One column of texts from a file of any of these formats.

    Raises:
        FtError: the file cannot be read, has no such column, or there is something else in it.
    """
    return _texts(_read(path, [column]), column, path)


def _numbered(
    split: str, answers: Sequence[str | int], given: Sequence[str] | None, told: Sequence[str] | None, column: str
) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels as numbers, and their names where they were words.

    Whole numbers are words too where all of them are among the names `given`, such as stars from 1 to 5. Where the
    files have `told` names for the numbers 0, 1, ... themselves, numbers are these.
    """
    words = [str(answer).strip() for answer in answers]
    if "" in words:
        raise FtError(f"the {column} in row {words.index('')} of the {split} split is empty; fill it or leave it out")
    in_names = given is not None and told is None and set(words) <= set(given)
    are_numbers = (isinstance(answer, int) or WHOLE_NUMBER.fullmatch(answer.strip()) for answer in answers)
    if not in_names and all(are_numbers):
        return [int(answer) for answer in answers], None
    if not in_names and any(isinstance(answer, int) for answer in answers):
        raise FtError(f"the column {column!r} of the {split} split holds numbers in one file and words in another")
    names = tuple(given) if given is not None else tuple(sorted(set(words)))
    number = {name: i for i, name in enumerate(names)}
    for row, word in enumerate(words):
        if word not in number:
            raise FtError(
                f"the {column} in row {row} of the {split} split is {_shown(word)}, the labels are {listed(names)}; "
                "correct the data, or name all labels by --label-names"
            )
    return [number[word] for word in words], names


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names for a message: of very many the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:60] for name in names[:most]) + more


def _read(path: Path, wanted: Sequence[str]) -> "pa.Table":
    """The columns wanted of a file, whatever its format.

    Raises:
        FtError: the file cannot be read, or lacks a column.
    """
    import pyarrow as pa  # here, since a tenth of a second of start-up is spent only where a table is read

    kind = (suffix_of(path.name) or ".parquet").removesuffix(".gz").removeprefix(".")
    readers: dict[str, Callable[[Path, Sequence[str]], pa.Table]] = {
        "parquet": _read_parquet,
        "csv": _read_csv,
        "tsv": _read_csv,
        "jsonl": _read_jsonl,
    }
    try:
        return readers[kind](path, wanted)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "; save it as UTF-8" if "utf8" in reason.lower() else ""
        raise FtError(f"cannot read {path} as {kind}: {reason}{remedy}") from error


def _require(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    absent = [column for column in wanted if column not in present]
    if absent:
        raise FtError(
            f"{path} has no column {absent[0]!r}; its columns are {listed(present)}: name them by --text-column and "
            "--label-column, or --prompt-column and --completion-column"
        )
    twice = [column for column in wanted if list(present).count(column) > 1]
    if twice:
        raise FtError(f"{path} has several columns {twice[0]!r}: rename all but one")


def _read_parquet(path: Path, wanted: Sequence[str]) -> "pa.Table":
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)  # not read_table(), which imports pandas where there is one
    _require(path, wanted, file.schema_arrow.names)
    return file.read(columns=list(wanted))


def _read_csv(path: Path, wanted: Sequence[str]) -> "pa.Table":
    """Every value as the text that it is: a review of "2001" is no number, and one of "NA" is not null."""
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if ".tsv" in path.suffixes else ",", newlines_in_values=True)
    read = csv.ReadOptions(block_size=LARGEST_ROW)
    if path.stat().st_size == 0:
        raise FtError(f"{path} is empty: its first line must name the columns")
    with csv.open_csv(path, read_options=read, parse_options=parse) as reader:
        _require(path, wanted, reader.schema.names)
    convert = csv.ConvertOptions(
        include_columns=list(wanted), column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
    )
    return csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)


def _read_jsonl(path: Path, wanted: Sequence[str]) -> "pa.Table":
    """Text columns as text, where PyArrow by itself would take some for times; labels as text or whole numbers."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    read = arrow_json.ReadOptions(block_size=LARGEST_ROW)
    inferred = arrow_json.read_json(path, read_options=read).schema
    _require(path, wanted, inferred.names)
    as_text = [(name, pa.string()) for name in wanted if not pa.types.is_integer(inferred.field(name).type)]
    parse = arrow_json.ParseOptions(explicit_schema=pa.schema(as_text))
    return arrow_json.read_json(path, read_options=read, parse_options=parse).select(list(wanted))


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _texts(table: "pa.Table", column: str, path: Path) -> list[str]:
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not _is_text(kind):
        raise FtError(f"the column {column!r} of {path} holds {kind}, it must hold text")
    _refuse_nulls(table, column, path)
    texts = []
    values = table[column].cast(pa.large_string()) if pa.types.is_dictionary(kind) else table[column]
    for row, text in enumerate(values.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(text.decode())
        except UnicodeDecodeError as error:
            raise FtError(f"the {column} in row {row} of {path} is not UTF-8: {error.reason}") from error
    return texts


def _whole_numbers(table: "pa.Table", column: str, path: Path) -> list[int]:
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not pa.types.is_integer(kind):
        raise FtError(f"the column {column!r} of {path} holds {kind}, it must hold whole numbers or words")
    _refuse_nulls(table, column, path)
    return list(table[column].to_pylist())


def _refuse_nulls(table: "pa.Table", column: str, path: Path) -> None:
    if table[column].null_count:
        row = table[column].is_null().to_pylist().index(True)
        raise FtError(f"the {column} in row {row} of {path} is null; fill it or leave the row out")


def _names_in_metadata(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes, which the `datasets` library keeps as JSON in a parquet file's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
