"""Weights of the loss by class: so that rare classes count as much as frequent ones, or as much as the user wants."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft.checks import BALANCED, weights_given
from ft.config import Config
from ft.data.examples import Example
from ft.data.load import Data
from ft.data.table import listed
from ft.errors import UsageError, shown


def class_weights(config: Config, data: Data) -> list[float] | None:
    """The weight of each label, in their order; None without `--class-weights`.

    Raises:
        UsageError: there is not one weight for each label.
    """
    if config.class_weights is None:
        return None
    if config.class_weights == BALANCED:
        return balanced_weights(data.splits["train"].labels, len(data.label_names))
    weights = weights_given(config.class_weights)
    if len(weights) != len(data.label_names):
        raise UsageError(
            f"--class-weights is {shown(config.class_weights)}, which has {len(weights)} of {len(data.label_names)} "
            f"weights: give one for each of the labels {listed(data.label_names)}, in this order"
        )
    return weights


def balanced_weights(labels: Sequence[int], num_labels: int) -> list[float]:
    """Weights n / (K count) by which the examples of each of K classes weigh as much as those of any other.

    The n examples together weigh n. K counts the classes that have examples, as in scikit-learn's
    `compute_class_weight("balanced")` with the classes that occur; a class without examples has the weight 0 here. The
    formula is of King and Zeng, "Logistic Regression in Rare Events Data" (2001).

    Args:
        labels: the class of each training example, below `num_labels`.
        num_labels: the length of the result.
    """
    counts = Counter(labels)
    return [len(labels) / (len(counts) * counts[label]) if counts[label] else 0.0 for label in range(num_labels)]


def describe_weights(weights: Sequence[float], names: Sequence[str]) -> str:
    """A sentence with the weight of each label."""
    pairs = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(names, weights, strict=True))
    return f"Training losses are weighted by class: {pairs}; losses of evaluations are not weighted."


@dataclass(frozen=True)
class TargetWeights:
    """The weights of the loss by target token.

    Attributes:
        by_token: the weight of each label's token.
        tensor: (V,) the same for the vocabulary, on the device; 1 for tokens that stand for no label.
    """

    by_token: Mapping[int, float]
    tensor: Tensor

    @classmethod
    def of(
        cls, weights: Sequence[float], label_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> "TargetWeights":
        """The weights of labels, given the token of each label."""
        tensor = torch.ones(vocab_size)
        tensor[list(label_ids)] = torch.tensor(weights)
        return cls(dict(zip(label_ids, weights, strict=True)), tensor.to(device))

    def total(self, examples: Sequence[Example]) -> float:
        """The sum of the weights of all targets."""
        return sum(self.by_token[token] for example in examples for token in example.target_ids)
