"""Sequences of unequal length, end to end in one array, so that no layer computes padding.

A batch of three sequences of 4, 2 and 3 tokens is held as one array of N = 9 rows, not as a (3, 4) grid with three
padded places:

    packed    a0 a1 a2 a3 | b0 b1 | c0 c1 c2           (N, C)
    padded    a0 a1 a2 a3 / b0 b1 .. .. / c0 c1 c2 ..  (B, T, C)

Every position-wise layer (embeddings, layer norms, linear layers, GELU, dropout) treats rows alike and never learns
of the packing. Only attention mixes rows of one sequence; it asks for the padded form and goes back at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; the copy to a GPU neither waits for the work queued there nor makes it wait.

    Only page-locked memory can be copied while both sides go on working.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Packing:
    """Where each of N packed rows belongs in the padded (B, T) grid.

    Attributes:
        shape: (B, T), the number of sequences and the length of the longest.
        positions: (N,) int64, each row's position within its own sequence, from 0.
        slots: (N,) int64, each row's index in the flattened (B * T) grid.
    """

    shape: tuple[int, int]
    positions: Tensor
    slots: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Packing":
        """The packing of `len(lengths)` sequences, each of at least one token."""
        batch_size, max_length = len(lengths), max(lengths)
        positions = torch.tensor(list(chain.from_iterable(map(range, lengths))))
        starts = torch.tensor(
            list(chain.from_iterable(map(repeat, range(0, batch_size * max_length, max_length), lengths)))
        )
        return cls(shape=(batch_size, max_length), positions=positions, slots=starts + positions)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, C) -> (B, T, C), with zeros in the padded places."""
        batch_size, max_length = self.shape
        padded = packed.new_zeros(batch_size * max_length, packed.shape[-1])
        return padded.index_copy_(0, self.slots, packed).unflatten(0, self.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, C) -> (N, C), dropping the padded places."""
        return padded.flatten(0, 1).index_select(0, self.slots)

    def with_past(self, attention: object, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, (B, T, C) each, that these rows attend to in one layer: their own.

        Whole sequences have no past. Rows that continue one do, and `ft/inference/kv_cache.py` puts it in front.
        """
        return keys, values

    def to(self, device: torch.device) -> "Packing":
        """The same packing with its index arrays on `device`."""
        return Packing(
            shape=self.shape,
            positions=to_device(self.positions, device),
            slots=to_device(self.slots, device),
        )


@dataclass(frozen=True)
class Selection:
    """Some rows of a packed batch: those whose logits somebody will read.

    Fine-tuning on a label needs one row of each sequence, the last. Where only the selected rows are needed, the last
    block computes its queries, its attention output and its MLP for them alone; keys and values still come from all.

    Attributes:
        rows: (S,) int64, indices into the packed rows, ascending.
        packing: the packing of the S selected rows by themselves, in a (B, Q) grid.
        mask: (B, 1, Q, T) bool, which of the T keys each selected row may attend to: those up to itself.
    """

    rows: Tensor
    packing: Packing
    mask: Tensor

    @classmethod
    def last(cls, lengths: Sequence[int], counts: Sequence[int], pad_to: int | None = None) -> "Selection":
        """The last `counts[b]` rows, at least one, of each sequence b of `lengths[b]` rows.

        With `pad_to`, each sequence is followed by padding rows up to that length.
        """
        max_length = pad_to or max(lengths)
        packing = Packing.of(counts)
        starts = accumulate([pad_to or length for length in lengths], initial=0)
        query_positions = [range(length - count, length) for length, count in zip(lengths, counts, strict=True)]
        rows = [start + p for start, positions in zip(starts, query_positions, strict=False) for p in positions]
        flat_positions = torch.tensor(list(chain.from_iterable(query_positions)))
        positions = packing.unpack(flat_positions.unsqueeze(-1))  # (B, Q, 1); 0 in padded places
        mask = torch.arange(max_length) <= positions  # (B, Q, T); a padded query sees key 0, so no row is all masked
        return cls(rows=torch.tensor(rows), packing=packing, mask=mask.unsqueeze(1))

    def to(self, device: torch.device) -> "Selection":
        """The same selection with its index arrays on `device`."""
        return Selection(
            rows=to_device(self.rows, device),
            packing=self.packing.to(device),
            mask=to_device(self.mask, device),
        )
