"""Packed batches: sequences of different lengths concatenated into one tensor, so that no layer computes padding.

A batch of B = 3 sequences of 4, 2 and 3 tokens is a tensor of N = 9 rows, not a padded (3, 4) grid of 12:

    packed    a0 a1 a2 a3 | b0 b1 | c0 c1 c2           (N, C)
    padded    a0 a1 a2 a3 / b0 b1 .. .. / c0 c1 c2 ..  (B, T, C)

    positions  0  1  2  3   0  1    0  1  2            (N,) index into the position embeddings
    slots      0  1  2  3   4  5    8  9 10            (N,) index into the flattened grid

Where oneDNN computes, up to 1/32 of spare rows follow the N rows (`with_spare_rows`).

Position-wise layers (embeddings, layer norms, linear layers, GELU, dropout) treat each row independently and need not
know the packing. Only attention mixes the rows of a sequence: it unpacks to the padded form and packs the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The place of each of N packed rows in the padded (B, T) grid.

    Attributes:
        shape: (B, T), the number of sequences and the length of the longest.
        positions: (N,) int64, the position of each row in its sequence, from 0.
        slots: (N,) int64, the index of each row in the flattened (B * T) grid.
        spare: rows that follow these N in packed tensors and in `positions`, and belong to no sequence.
    """

    shape: tuple[int, int]
    positions: Tensor
    slots: Tensor
    spare: int = field(default=0, kw_only=True)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Packing":
        """The packing of B sequences with these lengths, each of at least one token."""
        batch_size, max_length = len(lengths), max(lengths)
        positions = torch.tensor(list(chain.from_iterable(map(range, lengths))))
        starts = torch.tensor(
            list(chain.from_iterable(map(repeat, range(0, batch_size * max_length, max_length), lengths)))
        )
        return cls(shape=(batch_size, max_length), positions=positions, slots=starts + positions)

    def with_spare_rows(self) -> "Packing":
        """This packing with up to 1/32 more rows, so that from a number to its double there are 32 numbers of rows.

        oneDNN generates code for each number of rows, and keeps it: about 6 MB for the 124M model. Nothing depends on
        what the spare rows contain, and their gradients are 0. Fewer than 64 rows get none.
        """
        count = len(self.slots)
        spare = -count % 2 ** max(0, count.bit_length() - 6)
        return replace(self, positions=F.pad(self.positions[:count], (0, spare)), spare=spare)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N + spare, C) -> (B, T, C), with zeros as padding."""
        batch_size, max_length = self.shape
        padded = packed.new_zeros(batch_size * max_length, packed.shape[-1])
        rows = packed[: -self.spare] if self.spare else packed
        return padded.index_copy_(0, self.slots, rows).unflatten(0, self.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, C) -> (N + spare, C), without the padding."""
        slots = F.pad(self.slots, (0, self.spare)) if self.spare else self.slots  # spare rows repeat the first slot
        return padded.flatten(0, 1).index_select(0, slots)

    def with_past(self, attention: object, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, (B, T, C) each, that the rows attend to in the layer `attention`: their own.

        `Continuation` in `ft/inference/kv_cache.py` overrides this to prepend the cached keys and values.
        """
        return keys, values


@dataclass(frozen=True)
class Selection:
    """The S rows of a packed batch whose logits are needed.

    Fine-tuning on a label needs one row per sequence, the last. The last block computes queries, attention output and
    MLP for the selected rows only; keys and values still come from all rows.

    For the batch above, with the last row of each sequence selected:

        rows      3 5 8              (S,)
        mask      1 1 1 1            (B, 1, Q, T), here Q = 1
                  1 1 0 0
                  1 1 1 0

    Attributes:
        rows: (S,) int64, indices into the packed rows, ascending.
        packing: the packing of the S selected rows in a (B, Q) grid.
        mask: (B, 1, Q, T) bool, the keys that each selected row attends to: itself and earlier rows.
    """

    rows: Tensor
    packing: Packing
    mask: Tensor

    @classmethod
    def last(cls, lengths: Sequence[int], counts: Sequence[int], pad_to: int | None = None) -> "Selection":
        """Select the last rows of each sequence.

        Args:
            lengths: the rows of each sequence.
            counts: the rows to select of each, at least one.
            pad_to: length that each sequence is padded to in the packed batch itself. Default: no padding.
        """
        max_length = pad_to or max(lengths)
        packing = Packing.of(counts)
        starts = accumulate([pad_to or length for length in lengths], initial=0)
        query_positions = [range(length - count, length) for length, count in zip(lengths, counts, strict=True)]
        rows = [start + p for start, positions in zip(starts, query_positions, strict=False) for p in positions]
        flat_positions = torch.tensor(list(chain.from_iterable(query_positions)))
        positions = packing.unpack(flat_positions.unsqueeze(-1))  # (B, Q, 1); 0 as padding
        mask = torch.arange(max_length) <= positions  # (B, Q, T)
        # A padding query attends to key 0: softmax over a fully masked row would be NaN.
        return cls(rows=torch.tensor(rows), packing=packing, mask=mask.unsqueeze(1))

    def with_spare_rows(self) -> "Selection":
        """This selection with the spare rows of `Packing.with_spare_rows`: they select row 0 once more."""
        packing = self.packing.with_spare_rows()
        return replace(self, rows=F.pad(self.rows, (0, packing.spare)), packing=packing)
