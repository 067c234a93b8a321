"""Choosing the next token from the logits: greedy decoding, or sampling with temperature, top-k and top-p."""

import math
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ft.errors import UsageError

if TYPE_CHECKING:  # a wrong setting is reported without importing PyTorch
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits before the softmax. 1 samples from the model's distribution, less sharpens it,
            and 0 is greedy decoding: always the most likely token.
        top_k: sample only from this many most likely tokens (Fan et al., "Hierarchical Neural Story Generation", 2018).
        top_p: sample only from the smallest set of most likely tokens whose probabilities, at that temperature and
            among the `top_k`, sum to at least this (Holtzman et al., "The Curious Case of Neural Text Degeneration",
            2020).
        seed: seed of the random generator. Default: a random one.

    Raises:
        UsageError: a value is out of range; lists all problems.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature == 0 or 0.001 <= self.temperature <= 1000):
            problems.append(
                f"--temperature is {self.temperature}, it must be 0, for greedy decoding, or from 0.001 to 1000"
            )
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top-k is {self.top_k}, it must be at least 1")
        if self.top_p is not None and not 0.001 <= self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}, it must be from 0.001 to 1")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed is {self.seed}, it must be at least 0 and below 2**63")
        if self.temperature == 0:
            problems += [
                f"{flag} limits sampling, but at temperature 0 decoding is greedy: add --temperature 1"
                for flag, value in (("--top-k", self.top_k), ("--top-p", self.top_p))
                if value is not None
            ]
        if problems:
            raise UsageError(*problems)

    def scores(self, logits: "Tensor") -> "Tensor":
        """(V,) logits divided by the temperature, which must not be 0; -inf for tokens that top-k and top-p drop."""
        scores = logits / self.temperature
        if self.top_k is not None:
            threshold = scores.topk(min(self.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < threshold, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            descending, tokens = scores.sort(descending=True)
            probabilities = descending.softmax(dim=-1)
            # Drop a token if more likely ones sum to top_p already; the most likely token always stays.
            dropped = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            scores = scores.masked_fill(dropped.new_empty(len(scores)).scatter(0, tokens, dropped), -math.inf)
        return scores

    def choose(self, logits: "Tensor", generator: "Generator") -> int:
        """Choose the next token from its (V,) logits; sampling on the CPU gives the same tokens for all devices."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = self.scores(logits.float().cpu()).softmax(dim=-1)
        return int(probabilities.multinomial(1, generator=generator))
