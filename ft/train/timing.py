"""Where the time of a run goes, and how long its steps take, measured from outside: the training loop has no timer.

PyTorch's hooks on the model and on its parameters, and a wrapper around the collate function, mark the parts of a step.
Each reads the clock once and adds one number, some 150 times a step for GPT-2. No hook is on a block, so compiled
blocks are not affected.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    def skip(self) -> None:
        """Do not count the time since the last mark, such as that before the first step."""
        self._last_mark = time.perf_counter()

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


@dataclass(frozen=True)
class Speed:
    """The speed of the steps of a process, without evaluating and saving.

    Attributes:
        median, percentile_90: seconds per step, by nearest rank.
        steps_per_interval: the steps whose mean is one value; 1 if each was timed by itself.
        samples_per_second, tokens_per_second: of all ranks together.
    """

    median: float
    percentile_90: float
    steps_per_interval: float
    samples_per_second: float
    tokens_per_second: float


class StepIntervals:
    """The times of steps by the clock of the host: one number per step, or per log line on a GPU.

    On a GPU the host queues kernels and runs ahead, so that it does not see the end of a step. It waits for all of them
    when it reads the loss for a log line: there only the mean of the steps between two log lines is known.
    """

    def __init__(self, *, each_step: bool) -> None:
        """With `each_step` each step is an interval, else those between two calls of `values_read`."""
        self._each_step = each_step
        self._seconds, self._steps = array("d"), array("q")
        self._samples = self._tokens = 0
        self._open_samples = self._open_tokens = self._open_steps = 0
        self._started = time.perf_counter()

    def step_done(self, samples: int, tokens: int) -> None:
        """Count a step that read this many examples and input tokens."""
        self._open_steps += 1
        self._open_samples += samples
        self._open_tokens += tokens
        if self._each_step:
            self._close()

    def values_read(self) -> None:
        """Note that the host has waited for all steps."""
        if self._open_steps:
            self._close()

    def leave_out(self, seconds: float) -> None:
        """Do not count a pause of this length, which has just ended; nor what was before the first step."""
        self._started = self._started + seconds if self._seconds or self._open_steps else time.perf_counter()

    def _close(self) -> None:
        now = time.perf_counter()
        self._seconds.append((now - self._started) / self._open_steps)
        self._steps.append(self._open_steps)
        self._samples += self._open_samples
        self._tokens += self._open_tokens
        self._started = now
        self._open_samples = self._open_tokens = self._open_steps = 0

    def speed(self) -> Speed | None:
        """The speed of the steps so far; None if none is known."""
        total = sum(seconds * steps for seconds, steps in zip(self._seconds, self._steps, strict=True))
        if total <= 0:
            return None
        return Speed(
            self._quantile(0.5),
            self._quantile(0.9),
            sum(self._steps) / len(self._steps),
            self._samples / total,
            self._tokens / total,
        )

    def _quantile(self, share: float) -> float:
        """The smallest time that at least this share of the steps do not exceed."""
        ranked, steps = sorted(zip(self._seconds, self._steps, strict=True)), 0
        wanted = share * sum(self._steps)
        for seconds, count in ranked:
            steps += count
            if steps >= wanted:
                return seconds
        return ranked[-1][0]
