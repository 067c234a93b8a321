"""The rows of one split, and stratified samples of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch


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
class Split:
    """The rows of one split, in file order.

    Attributes:
        name: train, validation or test.
        texts: the input of each row: a text to classify, or a prompt.
        labels: the class number of each row; 0 if the split has completions.
        label_names: the names of the classes, if the files have them.
        label_numbers: the numbers in the files that --label-names names, in the same order, unless they are 0, 1, ...
        completions: the text that should follow each prompt; None if the split has labels.
        rows: the row number of each row in the files, from 0; None if the split has all rows.
        files: the files, in order; empty if the rows are not from files.
        in_words: whether the labels in the files are words, which `labels` numbers.
        notes: notes for the user on how the files were read, a sentence each.
    """

    name: str
    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...] | None = None
    completions: list[str] | None = None
    rows: tuple[int, ...] | None = None
    label_numbers: tuple[int, ...] | None = None
    in_words: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)
    files: tuple[FileRows, ...] = field(default=(), compare=False)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the rows as they are before tokenization, by which runs with the same split are recognized."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.labels, self.completions or repeat(None)):  # noqa: B905, repeat has no end
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def number_in_files(self, row: int) -> int:
        """The number, from 0, that a row of the split has over all rows of its files."""
        return row if self.rows is None else self.rows[row]

    def place(self, row: int) -> Place | None:
        """The place of a row in its file; None if the rows are not from files."""
        return place_in_files(self.files, self.number_in_files(row)) if self.files else None

    def place_record(self, row: int) -> dict[str, str | int | None]:
        """The place of a row for a record: file, row in it from 0, and line from 1; of rows without a file the row."""
        place = self.place(row)
        if place is None:
            return {"row": self.number_in_files(row)}
        return {"file": str(place.path), "row": place.row, "line": place.line}

    def where(self, row: int) -> str:
        """Describe a row for a message, by its file if it has one."""
        number = self.number_in_files(row)
        return where_in_files(self.files, [number]) if self.files else f"row {number} of the {self.name} split"

    def only(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """A split with some of the rows, under this or another name."""
        return Split(
            name or self.name,
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            self.label_names,
            None if self.completions is None else [self.completions[row] for row in rows],
            tuple(self.number_in_files(row) for row in rows),
            self.label_numbers,
            self.in_words,
            files=self.files,
        )


def stratified(groups: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw a stratified random sample without replacement: a pure function of its arguments.

    The size of each group is its proportional share, rounded down; the remaining rows go to the groups with the largest
    fractional parts. So each size differs from the exact share by less than one row.

    Args:
        groups: the group of each row.
        count: the size of the sample.
        seed: seed of the random generator.

    Returns:
        The row numbers of the sample, ascending.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    shares = {group: count * len(rows) / len(groups) for group, rows in members.items()}
    sizes = {group: int(share) for group, share in shares.items()}
    for group in sorted(shares, key=lambda group: sizes[group] - shares[group])[: count - sum(sizes.values())]:
        sizes[group] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for group, rows in sorted(members.items()):
        order = torch.randperm(len(rows), generator=generator)[: sizes[group]]
        chosen += [rows[i] for i in order.tolist()]
    return sorted(chosen)
