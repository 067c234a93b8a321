"""The rows of one split, and stratified samples of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat

import torch

from ft.data.table import FileRows, Place, place_in_files, where_in_files


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


def join(splits: Sequence[Split], name: str) -> Split:
    """The rows of several splits as one, each with its place in the files."""
    files = [file for split in splits for file in split.files]
    rows: list[int] = []
    first = 0  # the number that the first row of a split's files has over all files
    for split in splits:
        rows += [first + split.number_in_files(row) for row in range(len(split.texts))]
        first += sum(file.num_rows for file in split.files)
    completions = [completion for split in splits for completion in split.completions or []]
    return Split(
        name,
        [text for split in splits for text in split.texts],
        [label for split in splits for label in split.labels],
        completions=completions or None,
        rows=tuple(rows),
        files=tuple(files),
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
