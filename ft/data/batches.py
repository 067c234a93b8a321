"""From examples to batches: the collate functions and the order in which an epoch reads the examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft.data.examples import Example
from ft.model.packing import Packing, Selection
from ft.model.transfer import to_device

MOST_TARGETS = 2048  # of a batch whose logits over the whole vocabulary are computed: 400 MB with GPT-2's
IGNORED = -100  # the target that PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """Several examples, end to end.

    Attributes:
        input_ids: (N,) int64, the examples' tokens without padding.
        target_ids: (S,) int64, the token that should follow each selected row.
        packing: which row belongs to which example.
        selection: the S rows whose logits are compared with the targets.
    """

    input_ids: Tensor
    target_ids: Tensor
    packing: Packing
    selection: Selection

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, to a GPU by one copy."""
        return to_device(self, device)


def collate(examples: Sequence[Example]) -> Batch:
    """The custom collate function: lay examples end to end, and note which rows are to predict the targets."""
    lengths = [len(example.input_ids) for example in examples]
    counts = [len(example.target_ids) for example in examples]
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]),
        target_ids=torch.tensor([token for example in examples for token in example.target_ids]),
        packing=Packing.of(lengths),
        selection=Selection.last(lengths, counts),
    )


def collate_padded(examples: Sequence[Example], batch_size: int, max_length: int) -> Batch:
    """The same batch in arrays whose shapes never change, for kernels compiled or recorded for one shape.

    Every sequence is padded to `max_length - 1` input tokens, and the batch to `batch_size` examples of one token
    without a target. What is added changes no loss: padding stands behind all that reads it, and `IGNORED` is no
    target. Each example must have one target.
    """
    length = max_length - 1
    filled = [*examples, *[Example([0], [IGNORED])] * (batch_size - len(examples))]
    return Batch(
        input_ids=torch.tensor([token for e in filled for token in [*e.input_ids, *[0] * (length - len(e.input_ids))]]),
        target_ids=torch.tensor([token for e in filled for token in e.target_ids]),
        packing=Packing.of([length] * batch_size),
        selection=Selection.last([len(e.input_ids) for e in filled], [1] * batch_size, pad_to=length),
    )


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch reads the examples: a pure function of the seed and the epoch.

    It is the order of the Hugging Face Trainer, and a resumed run finds its place in it without reading anything.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order


def by_length(examples: Sequence[Example]) -> list[int]:
    """The examples' numbers from the shortest to the longest.

    In this order the sequences of a batch are about equally long, and attention computes little padding.
    """
    return sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))


def batches_by_length(examples: Sequence[Example], batch_size: int, processes: int = 1) -> Iterator[list[int]]:
    """The examples' numbers in batches of similar lengths.

    Each of the processes that share a batch by turns gets at most `batch_size` examples and, unless a single example
    has more, `MOST_TARGETS` targets: so the logits of completions, however long, take a bounded amount of memory.
    """
    numbers: list[int] = []
    targets = [0] * processes  # of each process
    for number in by_length(examples):
        count, process = len(examples[number].target_ids), len(numbers) % processes
        if len(numbers) == batch_size * processes or (numbers and targets[process] + count > MOST_TARGETS):
            yield numbers
            numbers, targets, process = [], [0] * processes, 0
        numbers.append(number)
        targets[process] += count
    if numbers:
        yield numbers


def in_batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` examples in the given order; the last may be smaller."""
    for start in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])
