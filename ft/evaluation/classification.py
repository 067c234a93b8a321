"""How good predictions are: accuracy, F1, a confusion matrix, and whether probabilities mean what they say."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ft.data.splits import Split
from ft.io.atomic import atomic_write_text

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


BINS = 10
MISTAKES = 20  # how many of the surest are kept in scores.json


@dataclass(frozen=True)
class Scores:
    """The scores of N predictions of K classes.

    Attributes:
        accuracy: the share that is right.
        precision: for each class, of the predictions of it the share that is right; 0 where there is none.
        recall: for each class, of its examples the share that was found; 0 where there is none.
        f1: for each class, the harmonic mean of both.
        macro_f1: the mean of `f1` over the classes, whatever their sizes.
        confusion: (K, K) counts, a row per true class and a column per predicted one.
        calibration_error: how far stated probability and accuracy lie apart, as a mean over the examples in ten bins
            of probability (Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3).
        bins: for each of these that is not empty, its mean probability, its accuracy and its number of examples.
    """

    accuracy: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    macro_f1: float
    confusion: list[list[int]]
    calibration_error: float
    bins: list[tuple[float, float, int]]


def scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Score (N, K) probabilities against (N,) true classes."""
    n, k = probabilities.shape
    confidence, predicted = probabilities.double().max(dim=1)
    right = predicted == labels
    confusion = torch.bincount(labels * k + predicted, minlength=k * k).view(k, k)
    hits = confusion.diagonal().double()
    precision = hits / confusion.sum(dim=0).clamp(min=1)
    recall = hits / confusion.sum(dim=1).clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-300)

    bins, error = [], 0.0
    number = (confidence * BINS).ceil().clamp(1, BINS)  # the bin of 0.9 < p <= 1.0 is the tenth
    for i in range(1, BINS + 1):
        inside = number == i
        count = int(inside.sum())
        if count:
            stated, true = confidence[inside].mean().item(), right[inside].double().mean().item()
            bins.append((stated, true, count))
            error += count / n * abs(stated - true)
    return Scores(
        accuracy=right.double().mean().item(),
        precision=precision.tolist(),
        recall=recall.tolist(),
        f1=f1.tolist(),
        macro_f1=f1.mean().item(),
        confusion=confusion.tolist(),
        calibration_error=error,
        bins=bins,
    )


def confident_mistakes(probabilities: Tensor, labels: Tensor, number: int) -> list[int]:
    """The rows of at most `number` wrong predictions, the surest first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:number].tolist()


def mistake_records(
    probabilities: Tensor, split: Split, label_names: Sequence[str], number: int
) -> list[dict[str, int | float | str]]:
    """The surest mistakes, each with its row in the split, the true label, the one given, its probability, the text."""
    mistakes: list[dict[str, int | float | str]] = []
    for row in confident_mistakes(probabilities, torch.tensor(split.labels), number):
        probability, label = probabilities[row].max(dim=0)
        mistakes.append(
            {
                "row": row,
                "true": label_names[split.labels[row]],
                "label": label_names[int(label)],
                "probability": probability.item(),
                "text": split.texts[row],
            }
        )
    return mistakes


def write_scores(path: Path, step: int, probabilities: Tensor, split: Split, label_names: Sequence[str]) -> None:
    """Write what the (N, K) probabilities after a step say of a split as a JSON object: `Scores` and the mistakes.

    Raises:
        OSError: the disk is full, or refuses; a file of that name is as it was.
    """
    told: dict[str, Any] = {"step": step, "split": split.name, "labels": list(label_names)}
    told |= asdict(scores(probabilities, torch.tensor(split.labels)))
    told["mistakes"] = mistake_records(probabilities, split, label_names, MISTAKES)
    atomic_write_text(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
