"""Where a run's time goes, observed from outside: the training loop has no timer in it.

Everything that tells the parts of a step apart is a hook of PyTorch's on the whole model or on its parameters, or a
wrapper around the collate function. Each reads the clock once and adds one number, some 150 times a step for GPT-2.
Compiled blocks stay as they are, since no hook is on them.
"""

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ft.data.batches import Batch
from ft.data.examples import Example


class StepTimes:
    """Seconds by part since they were last taken. A mark names what has passed since the mark before it.

    Unless `observe` tells the parts of a step apart, all of it is `training`.
    """

    def __init__(self) -> None:
        self._seconds = {"training": 0.0}
        self._end_of_step = "training"
        self._last_mark = time.perf_counter()

    def mark(self, part: str) -> None:
        """Count the time since the last mark as that of `part`."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last_mark
        self._last_mark = now

    def end_of_step(self) -> None:
        """Count the time since the last mark as that of the step's end."""
        self.mark(self._end_of_step)

    def take(self) -> dict[str, float]:
        """Seconds by part, those with any, in the order of a step; counting begins anew."""
        taken = {part: round(seconds, 4) for part, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return {part: seconds for part, seconds in taken.items() if seconds}

    def observe(
        self, model: nn.Module, collate: Callable[[Sequence[Example]], Batch]
    ) -> Callable[[Sequence[Example]], Batch]:
        """Tell the parts of each step of `model` apart; returns the collate function to use from now on.

        They are `data` (collating, and moving to the device), `forward`, `backward` (with the loss; it ends with the
        last gradient) and `update` (clipping, AdamW, freeing the gradients). For CPUs only: on a GPU these moments are
        those at which work is queued, not those at which it is done.
        """
        self._seconds = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
        self._end_of_step = "update"

        def before_forward(module: nn.Module, _: object) -> None:
            if module.training:
                self.mark("data")

        def after_forward(module: nn.Module, _: object, __: object) -> None:
            if module.training:
                self.mark("forward")

        def gradient_is_there(_: Tensor) -> None:
            self.mark("backward")

        def timed_collate(examples: Sequence[Example]) -> Batch:
            self.end_of_step()
            batch = collate(examples)
            self.mark("data")
            return batch

        model.register_forward_pre_hook(before_forward)
        model.register_forward_hook(after_forward)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(gradient_is_there)
        return timed_collate
