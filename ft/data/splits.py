"""The rows of one split, and stratified samples of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Split:
    """The rows of one split, in file order.

    Attributes:
        name: train, validation or test.
        texts: the input of each row: a text to classify, or a prompt.
        labels: the class number of each row; 0 if the split has completions.
        label_names: the names of the classes, if the files have them.
        completions: the text that should follow each prompt; None if the split has labels.
        rows: the row number of each row in the files, from 0; None if the split has all rows.
        in_words: whether the labels in the files are words, which `labels` numbers.
        notes: notes for the user on how the files were read, a sentence each.
    """

    name: str
    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...] | None = None
    completions: list[str] | None = None
    rows: tuple[int, ...] | None = None
    in_words: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def only(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """A split with some of the rows, under this or another name."""
        numbers = self.rows or range(len(self.texts))
        return Split(
            name or self.name,
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            self.label_names,
            None if self.completions is None else [self.completions[row] for row in rows],
            tuple(numbers[row] for row in rows),
            self.in_words,
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
