"""Keys and values of the tokens so far are kept, so that each further token costs the work of one row.

A causal model never looks ahead: what a layer computed for a token stays as it is, whatever follows. All that a new
token needs of the tokens before it are their keys and values, in every layer. It is then the only row of its call:

    first call     rows  a0 a1 a2 a3    their keys and values are kept
    second call    row   a4             its own are added, and it attends to those of a0 a1 a2 a3 a4
    third call     row   a5             and so on

Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019), writes this out and counts its cost.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ft.model.packing import Packing


@dataclass(frozen=True)
class Continuation(Packing):
    """The rows of one sequence that the model sees in one call, and what is kept of the calls before.

    Begin with `of_prompt` and take `next` for every further token.

    Attributes:
        start: the number of rows of earlier calls.
        capacity: how many rows all calls together may have.
        cache: of each attention layer the keys and the values, (1, capacity, C) each; filled up to this call's rows.
    """

    start: int
    capacity: int
    cache: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_prompt(cls, length: int, capacity: int, device: torch.device) -> "Continuation":
        """The first `length` rows, which have no past."""
        rows = torch.arange(length, device=device)
        return cls(shape=(1, length), positions=rows, slots=rows, start=0, capacity=capacity)

    def next(self) -> "Continuation":
        """The row after these, by itself."""
        return Continuation(
            shape=(1, 1),
            positions=self.positions[-1:] + 1,
            slots=self.slots[:1],
            start=self.start + self.shape[1],
            capacity=self.capacity,
            cache=self.cache,
        )

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, C) -> (1, T, C): a sequence alone has no padding."""
        return packed.unsqueeze(0)

    def pack(self, padded: Tensor) -> Tensor:
        """(1, T, C) -> (T, C)."""
        return padded.squeeze(0)

    def with_past(self, attention: object, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of these rows, (1, T, C) each; returns those of all rows so far."""
        if attention not in self.cache:
            room = (1, self.capacity, keys.shape[-1])
            self.cache[attention] = keys.new_empty(room), values.new_empty(room)
        all_keys, all_values = self.cache[attention]
        end = self.start + self.shape[1]
        all_keys[:, self.start : end] = keys
        all_values[:, self.start : end] = values
        return all_keys[:, :end], all_values[:, :end]
