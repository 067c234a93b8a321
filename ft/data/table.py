"""A table as read from a file of any format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Attributes:
        path: the file.
        names: the names of all columns.
        column: a function from a column's index to its values, which it reads.
        lines: the line in which each row begins, from 1; None if the format has no lines.
        metadata: the metadata of the file's Arrow schema.
        notes: notes for the user on how the file is read, a sentence each.
    """

    path: Path
    names: Sequence[str]
    column: Callable[[int], Sequence[Any]]
    lines: Sequence[int] | None = None
    metadata: dict[bytes, bytes] | None = None
    notes: tuple[str, ...] = ()

    def where(self, rows: Sequence[int]) -> str:
        """Describe rows for a message: `row 3 of x.csv (line 5)`, or for several their count and the first ten."""
        in_lines = "" if self.lines is None else f" (line {self.lines[rows[0]]:,})"
        if len(rows) == 1:
            return f"row {rows[0]} of {self.path}{in_lines}"
        kind, numbers = ("rows", rows) if self.lines is None else ("lines", [self.lines[row] for row in rows])
        more = ", ..." if len(rows) > 10 else ""
        return f"{len(rows):,} rows of {self.path} ({kind} {', '.join(map(str, numbers[:10]))}{more})"
