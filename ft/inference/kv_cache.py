"""KV cache: keep the keys and values of all tokens so far, so that each new token costs the work of one row.

With causal attention, the activations of a token do not depend on later tokens. Of the earlier tokens a new one needs
only their keys and values, in each layer, and is itself the only row of its forward pass:

    prompt          rows  a0 a1 a2 a3    their keys and values are cached
    first token     row   a4             appends its own, and attends to those of a0 a1 a2 a3 a4
    second token    row   a5             and so on

Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019), describes this and analyzes its cost.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ft.model.packing import Packing


@dataclass(frozen=True)
class Continuation(Packing):
    """The packing of the rows of one forward pass over one sequence, and the cache of the earlier passes.

    Begin with `of_prompt`; `next` gives the packing of each further token.

    Attributes:
        start: the number of cached rows before these.
        capacity: the most rows of all passes together.
        cache: for each attention layer its keys and values, (1, capacity, C) each; shared by all passes.
    """

    start: int
    capacity: int
    cache: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_prompt(cls, length: int, capacity: int, device: torch.device) -> "Continuation":
        """The packing of a prompt of `length` tokens, with an empty cache."""
        rows = torch.arange(length, device=device)
        return cls(shape=(1, length), positions=rows, slots=rows, start=0, capacity=capacity)

    def next(self) -> "Continuation":
        """The packing of the one row after these."""
        return Continuation(
            shape=(1, 1),
            positions=self.positions[-1:] + 1,
            slots=self.slots[:1],
            start=self.start + self.shape[1],
            capacity=self.capacity,
            cache=self.cache,
        )

    def with_spare_rows(self) -> "Continuation":
        """This packing: the rows of a single sequence are used as they are."""
        return self

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, C) -> (1, T, C): a single sequence has no padding."""
        return packed.unsqueeze(0)

    def pack(self, padded: Tensor) -> Tensor:
        """(1, T, C) -> (T, C)."""
        return padded.squeeze(0)

    def with_past(self, attention: object, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Cache the keys and values of these rows, (1, T, C) each; returns those of all rows so far."""
        if attention not in self.cache:
            shape = (1, self.capacity, keys.shape[-1])
            self.cache[attention] = keys.new_empty(shape), values.new_empty(shape)
        all_keys, all_values = self.cache[attention]
        end = self.start + self.shape[1]
        all_keys[:, self.start : end] = keys
        all_values[:, self.start : end] = values
        return all_keys[:, :end], all_values[:, :end]
