"""Where the time of a run goes, measured from outside: the training loop has no timer.

PyTorch's hooks on the model and on its parameters, and a wrapper around the collate function, mark the parts of a step.
Each reads the clock once and adds one number, some 150 times a step for GPT-2. No hook is on a block, so compiled
blocks are not affected.
"""

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ft.data.batches import Batch
from ft.data.examples import Example


class StepTimes:
    """Seconds by part since the last call of `take`. A mark names the part that has just ended.

    Without `observe` there is one part, `training`.
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
        """Return the seconds of each part that is not 0, in the order of a step, and reset them."""
        taken = {part: round(seconds, 4) for part, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return {part: seconds for part, seconds in taken.items() if seconds}

    def observe(
        self, model: nn.Module, collate: Callable[[Sequence[Example]], Batch]
    ) -> Callable[[Sequence[Example]], Batch]:
        """Measure the parts of each step of `model`; returns the collate function to use from now on.

        They are `data` (collating, and moving to the device), `forward`, `backward` (with the loss; it ends with the
        last gradient) and `update` (clipping, AdamW, freeing the gradients). For CPUs only: on a GPU the hooks run when
        kernels are queued, not when they have run.
        """
        self._seconds = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
        self._end_of_step = "update"

        def before_forward(module: nn.Module, _: object) -> None:
            if module.training:
                self.mark("data")

        def after_forward(module: nn.Module, _: object, __: object) -> None:
            if module.training:
                self.mark("forward")

        def after_gradient(_: Tensor) -> None:
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
                parameter.register_post_accumulate_grad_hook(after_gradient)
        return timed_collate
