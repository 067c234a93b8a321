"""A confusion matrix of many classes, of which nobody can read every cell: what is most often taken for what."""

from collections.abc import Sequence
from typing import NamedTuple

MOST_COLUMNS = 12  # classes up to which a table with a column for each is easy to read


class Confusion(NamedTuple):
    """How many `texts` of the class `true` were called `said`; both are numbers of classes, and not the same."""

    true: int
    said: int
    texts: int


def most_confused(matrix: Sequence[Sequence[int]], number: int) -> list[Confusion]:
    """At most `number` pairs of classes, the most frequent first, of a matrix with a row for each true class."""
    found = [
        Confusion(true, said, count)
        for true, counts in enumerate(matrix)
        for said, count in enumerate(counts)
        if true != said and count > 0
    ]
    return sorted(found, key=lambda pair: -pair.texts)[:number]
