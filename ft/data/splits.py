"""The rows of one split, and stratified samples of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Split:
    """The rows of one split, in file order.

    Attributes:
        name: train, validation or test.
        texts: what the model reads.
        labels: the number of each text's class; 0 where there are completions instead.
        label_names: what the classes are called, where the files say so.
        completions: what should follow each text, where that is no class.
        rows: the number that each row has in the files, from 0; left out where all of them are here.
        in_words: whether the files tell the labels as words, which `labels` has numbered.
    """

    name: str
    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...] | None = None
    completions: list[str] | None = None
    rows: tuple[int, ...] | None = None
    in_words: bool = False

    def only(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """Some of the rows, as a split of this or another name."""
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
    """The row numbers, ascending, of a random sample of `count` rows that holds each group in proportion.

    Every group gets its share rounded down, and what is then missing goes to the largest fractions, so that no group
    is off by one row or more. A pure function of its arguments.
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
