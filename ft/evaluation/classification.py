"""Classification metrics: accuracy, majority baseline, precision, recall, F1, confusion matrix, calibration error."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ft.data.splits import Split
from ft.errors import one_line
from ft.io.plain_files import atomic_write_text, read_regular

MOST_COLUMNS = 12  # classes up to which a table with a column per class is easy to read
CONFUSIONS = 15  # pairs of labels that are printed if there are too many labels for a matrix
WIDEST_MATRIX = 120  # characters of a row with the names of the columns; in a wider one they are numbered
BINS = 10  # of probability, for the calibration error
MISTAKES = 20  # most confident errors that scores.json lists


@dataclass(frozen=True)
class Scores:
    """The metrics of N predictions of K classes.

    Attributes:
        accuracy: the fraction of correct predictions.
        precision: per class, the fraction of its predictions that are correct; 0 if it is never predicted.
        recall: per class, the fraction of its examples that are predicted correctly; 0 if it has no example.
        f1: per class, the harmonic mean of precision and recall.
        macro_f1: the unweighted mean of `f1` over the classes that are the true or the predicted class of an example.
        confusion: (K, K) counts, a row per true class and a column per predicted class.
        calibration_error: expected calibration error: the mean gap between confidence and accuracy in ten bins of
            confidence, weighted by their examples (Guo et al., "On Calibration of Modern Neural Networks", 2017,
            equation 3).
        bins: for each non-empty bin, its mean confidence, its accuracy and its number of examples.
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
    """Compute the metrics of (N, K) probabilities against (N,) true classes."""
    n, k = probabilities.shape
    confidence, predicted = probabilities.double().max(dim=1)
    correct = predicted == labels
    confusion = count_confusions(labels, predicted, k)
    hits = confusion.diagonal().double()
    precision = hits / confusion.sum(dim=0).clamp(min=1)
    recall = hits / confusion.sum(dim=1).clamp(min=1)

    bins, error = [], 0.0
    bin_numbers = (confidence * BINS).ceil().clamp(1, BINS)  # the tenth is 0.9 < p <= 1.0
    for i in range(1, BINS + 1):
        in_bin = bin_numbers == i
        count = int(in_bin.sum())
        if count:
            mean_confidence, accuracy = confidence[in_bin].mean().item(), correct[in_bin].double().mean().item()
            bins.append((mean_confidence, accuracy, count))
            error += count / n * abs(mean_confidence - accuracy)
    return Scores(
        accuracy=correct.double().mean().item(),
        precision=precision.tolist(),
        recall=recall.tolist(),
        f1=_f1(confusion).tolist(),
        macro_f1=macro_f1(confusion),
        confusion=confusion.tolist(),
        calibration_error=error,
        bins=bins,
    )


def count_confusions(labels: Tensor, predicted: Tensor, k: int) -> Tensor:
    """The (K, K) confusion matrix of (N,) true and predicted classes: a row per true class."""
    return torch.bincount(labels * k + predicted, minlength=k * k).view(k, k)


def macro_f1(confusion: Tensor) -> float:
    """The unweighted mean of the F1 of each class of a (K, K) confusion matrix.

    Classes without examples that are never predicted are left out, as by scikit-learn:
    https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html
    """
    occurs = confusion.sum(dim=0) + confusion.sum(dim=1) > 0
    return _f1(confusion)[occurs].mean().item()


def _f1(confusion: Tensor) -> Tensor:
    """The (K,) harmonic means of precision and recall: 2 TP / (2 TP + FP + FN), 0 for a class without any of these."""
    hits = confusion.diagonal().double()
    return 2 * hits / (confusion.sum(dim=0) + confusion.sum(dim=1)).clamp(min=1)


def majority_label(labels: Sequence[int]) -> int:
    """The most frequent label; of several the one with the lowest number."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def majority_baseline(train_labels: Sequence[int], labels: Sequence[int]) -> float:
    """The accuracy on `labels` of a model that always answers with the most frequent of `train_labels`."""
    return labels.count(majority_label(train_labels)) / len(labels)


class Confusion(NamedTuple):
    """How many examples of one class were predicted as another.

    Attributes:
        true: the number of the true class.
        predicted: the number of the predicted class, a different one.
        examples: how many.
    """

    true: int
    predicted: int
    examples: int


def most_confused(matrix: Sequence[Sequence[int]], number: int) -> list[Confusion]:
    """The most frequent confusions of a (K, K) confusion matrix, at most `number`, in descending order."""
    confusions = [
        Confusion(true, predicted, count)
        for true, counts in enumerate(matrix)
        for predicted, count in enumerate(counts)
        if true != predicted and count > 0
    ]
    return sorted(confusions, key=lambda confusion: -confusion.examples)[:number]


def confident_mistakes(probabilities: Tensor, labels: Tensor, number: int) -> list[int]:
    """The rows of the most confident errors, at most `number`, in descending order of confidence."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:number].tolist()


def mistake_records(
    probabilities: Tensor, split: Split, label_names: Sequence[str], number: int
) -> list[dict[str, int | float | str | None]]:
    """The most confident errors: place in the files, true label, predicted label, its probability, and text."""
    mistakes: list[dict[str, int | float | str | None]] = []
    for row in confident_mistakes(probabilities, torch.tensor(split.labels), number):
        probability, label = probabilities[row].max(dim=0)
        mistakes.append(
            {
                **split.place_record(row),
                "true": label_names[split.labels[row]],
                "predicted": label_names[int(label)],
                "probability": probability.item(),
                "text": split.texts[row],
            }
        )
    return mistakes


def score_record(
    probabilities: Tensor,
    loss: float,
    split: Split,
    label_names: Sequence[str],
    train_labels: Sequence[int],
    mistakes: int,
) -> dict[str, Any]:
    """The metrics of a split, its majority baseline and its most confident errors, as they are written as JSON.

    Args:
        probabilities: (N, K), of each label for each example.
        loss: mean cross-entropy over the labels, in nats.
        split: the N examples.
        label_names: the names of the K labels.
        train_labels: the labels of which the most frequent one is the answer of the baseline.
        mistakes: the largest number of errors.
    """
    return {
        "split": split.name,
        "labels": list(label_names),
        "loss": loss,
        "majority_label": label_names[majority_label(train_labels)],
        "majority_baseline": majority_baseline(train_labels, split.labels),
        **asdict(scores(probabilities, torch.tensor(split.labels))),
        "mistakes": mistake_records(probabilities, split, label_names, mistakes),
    }


def write_scores(
    path: Path,
    step: int,
    probabilities: Tensor,
    loss: float,
    split: Split,
    label_names: Sequence[str],
    train_labels: Sequence[int],
) -> None:
    """Write the `score_record` of a split to a file.

    Args:
        path: the file to write; replaced atomically.
        step: the training step after which the split was evaluated.
        probabilities: (N, K), of each label for each example.
        loss: mean cross-entropy over the labels, in nats.
        split: the N examples.
        label_names: the names of the K labels.
        train_labels: the labels of the training split.

    Raises:
        OSError: the file cannot be written; an existing file stays as it was.
    """
    record = {"step": step, **score_record(probabilities, loss, split, label_names, train_labels, MISTAKES)}
    atomic_write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_majority_label(run: Path, label_names: Sequence[str]) -> int | None:
    """The most frequent training label, which a finished run records in scores.json; None if it is not known."""
    try:
        name = json.loads(read_regular(run / "scores.json"))["majority_label"]
        return list(label_names).index(name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def score_tables(result: Scores, names: Sequence[str]) -> str:
    """The scores of each label, the confusion matrix, and the calibration."""
    names = [one_line(name) for name in names]
    width = max(9, *map(len, names))
    lines = ["  ".join(["label".ljust(width), "precision", "   recall", "       F1", " examples"])]
    for i, name in enumerate(names):
        figures = (result.precision[i], result.recall[i])
        count = sum(result.confusion[i])
        cells = (*(f"{x:9.2%}" for x in figures), f"{result.f1[i]:9.4f}", f"{count:9,}")
        lines.append("  ".join([name.ljust(width), *cells]))
    lines.append("")
    if len(names) <= MOST_COLUMNS:
        heads, cell = names, width
        if width + 7 + (cell + 2) * len(names) > WIDEST_MATRIX:  # number the columns, in the order of the rows
            heads, cell = [f"({number})" for number in range(1, len(names) + 1)], 7
            names = [f"{head} {name}" for head, name in zip(heads, names, strict=True)]
        lines.append("  ".join(["true \\ predicted".ljust(width + 7), *(head.rjust(cell) for head in heads)]))
        for name, counts in zip(names, result.confusion, strict=True):
            lines.append("  ".join([name.ljust(width + 7), *(f"{count:{cell},}" for count in counts)]))
    else:
        lines.append("  ".join(["true".ljust(width), "predicted".ljust(width), " examples"]))
        for true, predicted, examples in most_confused(result.confusion, CONFUSIONS):
            lines.append("  ".join([names[true].ljust(width), names[predicted].ljust(width), f"{examples:9,}"]))
    lines.append("\nmean probability  accuracy   examples")
    lines += [f"{mean:16.2%}  {accuracy:8.2%}  {count:9,}" for mean, accuracy, count in result.bins]
    return "\n".join(lines)
