"""Tables in parquet files and in the Arrow files of `datasets.save_to_disk`, read by PyArrow.

PyArrow is imported when such a file is read: the import takes a tenth of a second, for which a .csv does not wait.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.data.table import Table
from ft.errors import FtError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet_table(path: Path) -> Table:
    """Open a parquet file; each column is read on access.

    Raises:
        OSError: it cannot be read.
        ArrowException: it is damaged.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)  # not read_table(), which imports pandas if it is installed
    schema = file.schema_arrow

    def column(place: int) -> list[Any]:
        return _arrow_values(file.read(columns=[schema.names[place]]).column(0), path, schema.names[place])

    return Table(path, schema.names, column, metadata=schema.metadata, arrow=file.read)


def read_arrow_table(path: Path) -> Table:
    """Open a file of `datasets.save_to_disk`, which is an Arrow stream, or a file in Arrow's file format.

    Raises:
        OSError: it cannot be read.
        ArrowException: it is damaged.
    """
    import pyarrow as pa

    source = pa.memory_map(str(path))
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
    names = table.schema.names

    def column(place: int) -> list[Any]:
        values = table.column(place)
        values.validate(full=True)  # offsets of a damaged file may be out of bounds
        return _arrow_values(values, path, names[place])

    return Table(path, names, column, metadata=table.schema.metadata, arrow=lambda: table)


def _arrow_values(column: "pa.ChunkedArray", path: Path, name: str) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise FtError(f"the {name} in row {row} of {path} is not UTF-8: {error.reason}") from error
        raise
