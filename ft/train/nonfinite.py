"""Losses and gradients that are infinite or no numbers at all: kept out of the weights, counted, and told."""

import torch
from torch import Tensor

from ft.device import read_synchronizes
from ft.errors import FtError
from ft.train.optim import AdamW
from ft.train.state import State


class NonFiniteGuard:
    """Lets no step change the weights whose loss or gradient is not finite.

    The optimiser itself skips the update, by a flag that lies on the device: nothing waits for the device here. What
    has happened is read by `check`, at once on a CPU, elsewhere whenever the loop reads something anyway.
    """

    def __init__(self, device: torch.device, state: State, limit: int) -> None:
        """`state` is where steps are counted; no more than `limit` of the whole run may be skipped."""
        self._state, self._limit = state, limit
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, optimizer: AdamW, loss: Tensor, grad_norm: Tensor, *, scales_loss: bool) -> Tensor:
        """Look at a step before its update. Returns the loss, 0 in place of one that is not finite.

        Where fp16 scales the loss, gradients that overflow are a matter of the scale, which is lowered until they fit.

        Raises:
            NonFiniteError: as `check` does, on a CPU.
        """
        finite = torch.isfinite(loss) if scales_loss else torch.isfinite(loss) & torch.isfinite(grad_norm)
        optimizer.skip = (~finite).float()
        self._first = torch.where((self._first < 0) & ~finite, self._state.step, self._first)
        self._count += ~finite
        if not read_synchronizes(loss.device):
            self.check()
        return torch.where(finite, loss, 0.0)

    def check(self) -> None:
        """Count the steps that were skipped since the last call.

        Raises:
            NonFiniteError: they are more than the limit allows.
        """
        count = int(self._count)
        if count == 0:
            return
        self._state.skipped_steps += count
        self._state.loss_steps -= count
        if self._state.skipped_steps > self._limit:
            raise NonFiniteError(int(self._first))
        self._count.zero_()
        self._first.fill_(-1)


class NonFiniteError(FtError):
    """`step` (from 0) had a loss or gradient that is not finite, and no more steps may be skipped."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"the loss or the gradient of step {step + 1} is not finite")
