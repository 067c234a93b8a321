"""Scores of completions: loss, token accuracy, exact match, and the worst failures.

Tokens are scored with teacher forcing, as in training: each is predicted from the correct tokens before it. If the most
likely token is correct at every position, the final end-of-text included, the completion is an exact match: it is what
greedy decoding generates. With one wrong token, greedy decoding generates something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ft.data.batches import batches_by_length, collate
from ft.data.examples import Example
from ft.data.splits import Split
from ft.evaluation.perplexity import perplexity
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.io.progress import Count, no_progress
from ft.model.gpt2 import GPT2

MOST_GENERATED_TOKENS = 32  # of what the model generates in place of a wrong completion


@dataclass(frozen=True)
class CompletionScores:
    """The scores of all completions of a split.

    Attributes:
        completions: the number of completions.
        tokens: the number of target tokens, each final end-of-text included.
        loss: mean cross-entropy over the target tokens, in nats.
        perplexity: the exponential of the loss.
        accuracy: the fraction of target tokens that are the most likely of the vocabulary.
        exact_match: the fraction of completions of which all target tokens are the most likely.
    """

    completions: int
    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    exact_match: float


@dataclass(frozen=True)
class ExampleScores:
    """The scores of N examples.

    Attributes:
        losses: (N,) float64, cross-entropy summed over the targets of each example, in nats.
        hits: (N,) int64, the number of targets that are the most likely token.
        counts: (N,) int64, the number of targets.
    """

    losses: Tensor
    hits: Tensor
    counts: Tensor

    def scores(self) -> CompletionScores:
        """The scores over all examples."""
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
        """The examples without an exact match, at most `number`, in descending order of the loss per token."""
        wrong = (self.hits < self.counts).nonzero().flatten()
        per_token = self.losses[wrong] / self.counts[wrong]
        ranked: list[int] = wrong[per_token.argsort(descending=True, stable=True)].tolist()
        return ranked[:number]


@torch.inference_mode()
def score_completions(
    model: GPT2, examples: Sequence[Example], batch_size: int, progress: Count = no_progress
) -> ExampleScores:
    """Score each example. The model must be in evaluation mode. `progress` is called with the size of each batch."""
    device = model.wte.weight.device
    losses = torch.zeros(len(examples), dtype=torch.float64)
    hits = torch.zeros(len(examples), dtype=torch.int64)
    for numbers in batches_by_length(examples, batch_size):
        batch = collate([examples[number] for number in numbers]).to(device)
        logits = model(batch.input_ids, batch.packing, batch.selection).float()  # (S, V)
        loss = F.cross_entropy(logits, batch.target_ids, reduction="none").cpu().double()  # (S,)
        hit = (logits.argmax(dim=-1) == batch.target_ids).cpu().long()  # (S,)
        owners = torch.tensor([number for number in numbers for _ in examples[number].target_ids])  # (S,)
        losses.index_add_(0, owners, loss)
        hits.index_add_(0, owners, hit)
        progress(len(numbers))
    return ExampleScores(losses, hits, torch.tensor([len(example.target_ids) for example in examples]))


def failure_records(
    model: GPT2, tokenizer: Tokenizer, split: Split, examples: Sequence[Example], scored: ExampleScores, number: int
) -> list[dict[str, int | float | str | None]]:
    """The worst completions: place in the files, loss per token, prompt, completion, and what the model generates."""
    completions = split.completions or []
    return [
        {
            **split.place_record(row),
            "loss": (scored.losses[row] / scored.counts[row]).item(),
            "right_tokens": int(scored.hits[row]),
            "tokens": int(scored.counts[row]),
            "prompt": split.texts[row],
            "completion": completions[row],
            "written": _generate_instead(model, tokenizer, examples[row]),
        }
        for row in scored.worst(number)
    ]


def _generate_instead(model: GPT2, tokenizer: Tokenizer, example: Example) -> str:
    """Greedily continue the prompt of an example by about as many tokens as its completion has.

    The prompt is cut as in the example: of a long one the end, from the first complete character on.
    """
    prompt_ids = example.input_ids[: len(example.input_ids) - len(example.target_ids) + 1]
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False).lstrip("\ufffd")
    max_new_tokens = min(len(example.target_ids), MOST_GENERATED_TOKENS)
    return "".join(Generation(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=Sampling(seed=0)))
