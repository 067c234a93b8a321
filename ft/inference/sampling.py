"""How the next token is chosen from the model's logits: the likeliest, or drawn from the likelier ones."""

import math
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ft.errors import UsageError

if TYPE_CHECKING:  # a wrong setting is told without waiting for PyTorch
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Sampling:
    """The choice of a token.

    Attributes:
        temperature: what logits are divided by before they become probabilities. 1 draws as the model says, less makes
            the likely likelier, and 0 is its limit: always the likeliest token, and nothing is drawn.
        top_k: draw from this many likeliest tokens only (Fan et al., "Hierarchical Neural Story Generation", 2018).
        top_p: draw only from the smallest set of likeliest tokens whose probabilities, at that temperature and among
            the `top_k`, add up to this (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
        seed: where the drawing begins; the same seed draws the same. Left out, it is another each time.

    Raises:
        UsageError: a value is out of its range; all of them are told.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature == 0 or 0.001 <= self.temperature <= 1000):
            problems.append(
                f"--temperature is {self.temperature}, it must be 0, for the likeliest tokens, or from 0.001 to 1000"
            )
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top-k is {self.top_k}, it must be at least 1")
        if self.top_p is not None and not 0.001 <= self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}, it must be from 0.001 to 1")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed is {self.seed}, it must be at least 0 and below 2**63")
        if self.temperature == 0:
            problems += [
                f"{flag} limits what is drawn, but at temperature 0 nothing is: add --temperature 1"
                for flag, value in (("--top-k", self.top_k), ("--top-p", self.top_p))
                if value is not None
            ]
        if problems:
            raise UsageError(*problems)

    def scores(self, logits: "Tensor") -> "Tensor":
        """(V,) logits over the temperature, which must not be 0, with minus infinity for the tokens left out."""
        scores = logits / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            descending, tokens = scores.sort(descending=True)
            probabilities = descending.softmax(dim=-1)
            # Left out is a token if those before it suffice; the first is preceded by none, and stays.
            suffice = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            scores = scores.masked_fill(suffice.new_empty(len(scores)).scatter(0, tokens, suffice), -math.inf)
        return scores

    def choose(self, logits: "Tensor", generator: "Generator") -> int:
        """The next token, from its (V,) logits; a generator on the CPU draws the same for every device."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = self.scores(logits.float().cpu()).softmax(dim=-1)
        return int(probabilities.multinomial(1, generator=generator))
