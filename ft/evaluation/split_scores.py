"""What `evaluate` prints and writes: the scores of a split, or of all splits together, and a row for each example."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ft.data.examples import Example
from ft.data.splits import Split, join
from ft.device import Precision
from ft.errors import counted, one_line
from ft.evaluation.classification import score_record, score_tables, scores
from ft.evaluation.completions import ExampleScores
from ft.evaluation.evaluate import Evaluation, evaluate
from ft.inference.classifier import Classifier, to_prediction
from ft.io.progress import Count, no_progress


@dataclass(frozen=True)
class ScoredSplit(ABC):
    """A split that is evaluated.

    Attributes:
        split: the rows.
        seconds: the time of the evaluation.
    """

    split: Split
    seconds: float

    @abstractmethod
    def record(self, mistakes: int) -> dict[str, Any]:
        """The scores and at most `mistakes` of the worst errors, for JSON."""

    @abstractmethod
    def text(self, record: Mapping[str, Any], speed: str) -> str:
        """The `record` for a terminal; `speed` is added to the first line."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """For each example its place, its values and how the model does on it."""


@dataclass(frozen=True)
class ScoredLabels(ScoredSplit):
    """The scores of N labeled examples, whose labels are numbered as those of the model.

    Attributes:
        names: the names of the K labels.
        probabilities: (N, K) float64, of each label for each example.
        loss: mean cross-entropy of the label tokens, in nats, over the vocabulary as in training.
        majority: the most frequent label in training; None if it is not known.
    """

    names: Sequence[str]
    probabilities: Tensor
    loss: float
    majority: int | None

    def record(self, mistakes: int) -> dict[str, Any]:
        """The metrics, the majority baseline and at most `mistakes` of the most confident errors, for JSON."""
        train_labels = self.split.labels if self.majority is None else [self.majority]
        return score_record(self.probabilities, self.loss, self.split, self.names, train_labels, mistakes)

    def text(self, record: Mapping[str, Any], speed: str) -> str:
        """The `record` as tables; `speed` is added to the first line."""
        result = scores(self.probabilities, torch.tensor(self.split.labels))
        majority, baseline = one_line(record["majority_label"]), record["majority_baseline"]
        lines = [
            f"{self.split.name}: {counted(len(self.split.texts), 'example')}, accuracy {result.accuracy:.2%}, macro F1 "
            f"{result.macro_f1:.4f}, loss {self.loss:.4f}, calibration error {result.calibration_error:.2%}{speed}",
            f"Majority baseline, always {majority}: accuracy {baseline:.2%}"
            + ("" if result.accuracy > baseline else ", which the model does not beat"),
            "",
            score_tables(result, self.names),
        ]
        if record["mistakes"]:
            lines += ["", "most confident errors:"]
        for mistake in record["mistakes"]:
            label, true = (one_line(str(mistake[name])) for name in ("predicted", "true"))
            place = _place(mistake, self.split)
            text = one_line(str(mistake["text"]), 90)
            lines.append(f"  {label} ({mistake['probability']:.1%}, true label {true}, {place}): {text}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Place, text, label and prediction of each example."""
        found = []
        for row, values in enumerate(self.probabilities.tolist()):
            label, probabilities = to_prediction(values, self.names)
            found.append(
                {
                    "split": self.split.name,
                    **self.split.place_record(row),
                    "text": self.split.texts[row],
                    "label": self.names[self.split.labels[row]],
                    "predicted": label,
                    "probability": probabilities[label],
                    **{f"probability_{name}": value for name, value in probabilities.items()},
                }
            )
        return found

    @staticmethod
    def join(parts: "Sequence[ScoredLabels]", name: str) -> "ScoredLabels":
        """The scores over the rows of all splits together."""
        split, seconds = join([part.split for part in parts], name), sum(part.seconds for part in parts)
        loss = sum(part.loss * len(part.split.texts) for part in parts) / len(split.texts)
        probabilities = torch.cat([part.probabilities for part in parts])
        return ScoredLabels(split, seconds, parts[0].names, probabilities, loss, parts[0].majority)


@dataclass(frozen=True)
class ScoredCompletions(ScoredSplit):
    """The scores of N prompts and completions.

    Attributes:
        scored: the scores of each example.
        failures: the worst examples: see `failure_records`.
    """

    scored: ExampleScores
    failures: Sequence[dict[str, Any]]

    def record(self, mistakes: int) -> dict[str, Any]:
        """The metrics and at most `mistakes` of the failures, for JSON."""
        return {"split": self.split.name, **asdict(self.scored.scores()), "mistakes": self.failures[:mistakes]}

    def text(self, record: Mapping[str, Any], speed: str) -> str:
        """The `record` as lines; `speed` is added to the first."""
        result = self.scored.scores()
        lines = [
            f"{self.split.name}: {counted(result.completions, 'completion')} of {counted(result.tokens, 'token')}, "
            f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, token accuracy "
            f"{result.accuracy:.2%}, exact match {result.exact_match:.2%}{speed}"
        ]
        if record["mistakes"]:
            lines += ["", "highest loss per token:"]
        for failure in record["mistakes"]:
            prompt, expected, written = (one_line(str(failure[name])) for name in ("prompt", "completion", "written"))
            right = f"{failure['right_tokens']} of {failure['tokens']} tokens correct"
            lines += [
                f"  {failure['loss']:.2f} ({right}, {_place(failure, self.split)}): {prompt}",
                f"       expected:  {expected}",
                f"       generated: {written}",
            ]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Place, prompt, completion and scores of each example."""
        return [
            {
                "split": self.split.name,
                **self.split.place_record(row),
                "prompt": self.split.texts[row],
                "completion": completion,
                "loss": (self.scored.losses[row] / self.scored.counts[row]).item(),
                "right_tokens": int(self.scored.hits[row]),
                "tokens": int(self.scored.counts[row]),
            }
            for row, completion in enumerate(self.split.completions or [])
        ]

    @staticmethod
    def join(parts: "Sequence[ScoredCompletions]", name: str) -> "ScoredCompletions":
        """The scores over the rows of all splits together."""
        split, seconds = join([part.split for part in parts], name), sum(part.seconds for part in parts)
        losses, hits, counts = (
            torch.cat([getattr(part.scored, field) for part in parts]) for field in ("losses", "hits", "counts")
        )
        failures = sorted((failure for part in parts for failure in part.failures), key=lambda each: -each["loss"])
        return ScoredCompletions(split, seconds, ExampleScores(losses, hits, counts), failures)


def evaluate_in_fp32(
    model: Classifier,
    examples: Sequence[Example],
    label_ids: Sequence[int],
    batch_size: int,
    progress: Count = no_progress,
) -> Evaluation:
    """`evaluate` of a finished model, in the precision of its predictions; `label_ids` is empty for completions."""
    precision = Precision("fp32", "that of predictions", model.model.wte.weight.device)
    result = evaluate(model.model, examples, label_ids, batch_size=batch_size, precision=precision, progress=progress)
    assert result is not None, "nothing stops it"
    return result


def _place(record: Mapping[str, object], split: Split) -> str:
    """The place of a row in a few words: its line, else its row, and its file if there are several."""
    line = record.get("line")
    place = f"row {record['row']}" if line is None else f"line {line}"
    several = len({file.path for file in split.files}) > 1
    return f"{place} of {one_line(str(record['file']))}" if several else place
