"""From examples to batches: the collate functions, and the order of the examples in an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft.data.examples import Example
from ft.model.packing import Packing, Selection
from ft.model.transfer import to_device

MOST_TARGETS = 2048  # of a batch: with GPT-2's vocabulary, 400 MB of logits
IGNORED = -100  # the target that PyTorch's cross-entropy ignores


@dataclass(frozen=True)
class Batch:
    """A batch of B examples, packed.

    Three examples with the labels x, y and z, where $ is end-of-text:

        input_ids    a0 a1 a2 $ | b0 $ | c0 c1 $     (N,), N = 9
        selection             3      5          8    (S,) rows, S = 3
        target_ids            x      y          z    (S,)

    Attributes:
        input_ids: (N,) int64, the tokens of all examples without padding.
        target_ids: (S,) int64, the token that should follow each selected row.
        packing: the example and position of each row.
        selection: the S rows whose logits are compared with the targets.
    """

    input_ids: Tensor
    target_ids: Tensor
    packing: Packing
    selection: Selection

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to `device`, to a GPU in one copy."""
        return to_device(self, device)


def collate(examples: Sequence[Example]) -> Batch:
    """Collate examples into a packed batch.

    The last rows of each example predict its targets: one row for a label, several for a completion.
    """
    lengths = [len(example.input_ids) for example in examples]
    counts = [len(example.target_ids) for example in examples]
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]),
        target_ids=torch.tensor([token for example in examples for token in example.target_ids]),
        packing=Packing.of(lengths),
        selection=Selection.last(lengths, counts),
    )


def collate_padded(examples: Sequence[Example], batch_size: int, max_length: int) -> Batch:
    """Collate examples into a batch of static shapes, for `torch.compile` and CUDA graphs.

    Each example is padded to `max_length - 1` input tokens, and the batch to `batch_size` examples with the target
    `IGNORED`. The loss does not change: padding follows the real rows, which causal attention hides it from, and
    cross-entropy ignores the added targets.

    Args:
        examples: at most `batch_size` examples with one target each.
        batch_size: the examples of the batch, B.
        max_length: tokens of an example, its label included.

    Returns:
        A batch with N = B * (max_length - 1) and S = B.
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
    """The order of the examples in an epoch: a pure function of the seed and the epoch.

    It is the order of the Hugging Face Trainer. A resumed run computes it again and continues where it stopped.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order


def by_length(examples: Sequence[Example]) -> list[int]:
    """The indices of the examples, sorted by length, so that attention computes little padding in each batch."""
    return sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))


def batches_by_length(examples: Sequence[Example], batch_size: int, world_size: int = 1) -> Iterator[list[int]]:
    """Yield the indices of the examples in batches of similar lengths.

    The processes share a batch: process p takes the examples p, p + world_size, ... of it. Each gets at most
    `batch_size` examples and at most `MOST_TARGETS` targets (more only if a single example has more), which bounds the
    memory of the logits of completions.
    """
    indices: list[int] = []
    num_targets = [0] * world_size  # of each process
    for index in by_length(examples):
        count, process = len(examples[index].target_ids), len(indices) % world_size
        if len(indices) == batch_size * world_size or (indices and num_targets[process] + count > MOST_TARGETS):
            yield indices
            indices, num_targets, process = [], [0] * world_size, 0
        indices.append(index)
        num_targets[process] += count
    if indices:
        yield indices


def in_batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Yield batches of `batch_size` examples in the given order; the last may be smaller."""
    for start in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])
