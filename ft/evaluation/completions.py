"""How good a model's completions are: what their tokens cost it, how many it would have written, and where it fails.

A completion is judged token by token, each time with the right tokens before it, as in training. If the likeliest token
is the right one at every place, the end-of-text behind it included, then the completion is wholly right: it is exactly
what the model writes when it takes the likeliest token each time. One wrong token, and it writes something else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ft.data.batches import by_length, collate
from ft.data.examples import Example
from ft.data.splits import Split
from ft.evaluation.perplexity import perplexity
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.model.gpt2 import GPT2

MOST_TARGETS = 2048  # of a batch: with GPT-2's vocabulary their logits take 400 MB
WRITTEN_TOKENS = 32  # at most, of what the model writes where it is wrong


@dataclass(frozen=True)
class CompletionScores:
    """The scores of all completions of a split.

    Attributes:
        completions: how many there are.
        tokens: how many targets they have, the closing end-of-text counted.
        loss: the mean over these tokens, in nats.
        perplexity: its exponential.
        accuracy: the share of these tokens that are the likeliest of the whole vocabulary.
        exact_match: the share of completions all of whose tokens are.
    """

    completions: int
    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    exact_match: float


@dataclass(frozen=True)
class Judged:
    """What a model makes of N examples.

    Attributes:
        losses: (N,) float64, the sum over an example's targets, in nats.
        hits: (N,) int64, how many of its targets are the likeliest token.
        counts: (N,) int64, how many targets it has.
    """

    losses: Tensor
    hits: Tensor
    counts: Tensor

    def scores(self) -> CompletionScores:
        """All of them together."""
        loss = (self.losses.sum() / self.counts.sum()).item()
        return CompletionScores(
            completions=len(self.counts),
            tokens=int(self.counts.sum()),
            loss=loss,
            perplexity=perplexity(loss),
            accuracy=(self.hits.sum() / self.counts.sum()).item(),
            exact_match=(self.hits == self.counts).double().mean().item(),
        )

    def worst(self, number: int) -> list[int]:
        """At most `number` examples that are not wholly right, the largest loss per token first."""
        wrong = (self.hits < self.counts).nonzero().flatten()
        per_token = self.losses[wrong] / self.counts[wrong]
        ranked: list[int] = wrong[per_token.argsort(descending=True, stable=True)].tolist()
        return ranked[:number]


@torch.inference_mode()
def score_completions(model: GPT2, examples: Sequence[Example], batch_size: int) -> Judged:
    """Judge each example by itself. The model must be in evaluation mode; nothing is drawn at random."""
    device = model.wte.weight.device
    losses = torch.zeros(len(examples), dtype=torch.float64)
    hits = torch.zeros(len(examples), dtype=torch.int64)
    for numbers in _batches(examples, batch_size):
        batch = collate([examples[number] for number in numbers]).to(device)
        logits = model(batch.input_ids, batch.packing, batch.selection).float()  # (S, V)
        loss = F.cross_entropy(logits, batch.target_ids, reduction="none").cpu().double()  # (S,)
        hit = (logits.argmax(dim=-1) == batch.target_ids).cpu().long()  # (S,)
        owners = torch.tensor([number for number in numbers for _ in examples[number].target_ids])  # (S,)
        losses.index_add_(0, owners, loss)
        hits.index_add_(0, owners, hit)
    return Judged(losses, hits, torch.tensor([len(example.target_ids) for example in examples]))


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """The examples' numbers in batches, of similar lengths.

    Each holds at most `batch_size` examples and, unless a single one has more, `MOST_TARGETS` targets.
    """
    numbers: list[int] = []
    targets = 0
    for number in by_length(examples):
        count = len(examples[number].target_ids)
        if numbers and (len(numbers) == batch_size or targets + count > MOST_TARGETS):
            yield numbers
            numbers, targets = [], 0
        numbers.append(number)
        targets += count
    if numbers:
        yield numbers


def told_failures(
    model: GPT2, tokenizer: Tokenizer, split: Split, examples: Sequence[Example], judged: Judged, number: int
) -> list[dict[str, int | float | str]]:
    """The worst completions, each with its row in the split, its loss per token, and what the model writes instead."""
    completions = split.completions or []
    return [
        {
            "row": row,
            "loss": (judged.losses[row] / judged.counts[row]).item(),
            "right_tokens": int(judged.hits[row]),
            "tokens": int(judged.counts[row]),
            "prompt": split.texts[row],
            "completion": completions[row],
            "written": _written(model, tokenizer, examples[row]),
        }
        for row in judged.worst(number)
    ]


def _written(model: GPT2, tokenizer: Tokenizer, example: Example) -> str:
    """What the model writes after the prompt, greedily, and in about as many tokens as the right completion has.

    The prompt is what the model was given of it: of a long one the end, from the first whole character on.
    """
    prompt_ids = example.input_ids[: len(example.input_ids) - len(example.target_ids) + 1]
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False).lstrip("\ufffd")
    room = min(len(example.target_ids), WRITTEN_TOKENS)
    return "".join(Generation(model, tokenizer, prompt, max_new_tokens=room, sampling=Sampling(seed=0)))
