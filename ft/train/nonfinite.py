"""NaN or inf in losses and gradients: the update is skipped, counted, and reported."""

import torch
from torch import Tensor

from ft.device import read_synchronizes
from ft.errors import FtError
from ft.train.optim import AdamW
from ft.train.state import State


class NonFiniteGuard:
    """Skips updates whose loss or gradient is not finite.

    The optimizer skips the update by a flag on the device, so that the host does not wait for the device. `check` reads
    the result: after each step on a CPU, on other devices when the loop reads values anyway.

    All state of `watch`, including the step number, is in tensors that it updates in place: a CUDA graph would replay
    Python numbers and new tensors with the values of the capture.
    """

    def __init__(self, device: torch.device, state: State, limit: int) -> None:
        """Skipped steps are counted in `state`; at most `limit` steps of the run may be skipped."""
        self._state, self._limit = state, limit
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._step = torch.full((), state.step, dtype=torch.int64, device=device)  # of the next call of `watch`

    def watch(self, optimizer: AdamW, loss: Tensor, grad_norm: Tensor, *, scales_loss: bool) -> Tensor:
        """Set the skip flag of the optimizer if the loss or the gradient norm of this step is not finite.

        With a loss scale (fp16) only the loss counts: `GradScaler` skips steps whose gradients overflow, and lowers the
        scale until they do not.

        Returns:
            The loss, or 0 if the step is skipped.
        """
        finite = torch.isfinite(loss) if scales_loss else torch.isfinite(loss) & torch.isfinite(grad_norm)
        optimizer.skip = (~finite).float()
        self._first.copy_(torch.where((self._first < 0) & ~finite, self._step, self._first))
        self._count += ~finite
        self._step += 1
        return torch.where(finite, loss, 0.0)

    def check_at_once(self) -> None:
        """Call `check` if reading from the device does not synchronize.

        Raises:
            NonFiniteError: see `check`.
        """
        if not read_synchronizes(self._count.device):
            self.check()

    def check(self) -> None:
        """Read how many steps were skipped since the last call.

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
    """The loss or gradient of `step` (from 0) is not finite, and no more steps may be skipped."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"the loss or the gradient of step {step + 1} is not finite")
