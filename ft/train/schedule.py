"""How many steps a run has, the learning rate of each, and after which of them it saves."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from ft.config import Config
from ft.data.batches import epoch_order
from ft.train.state import State


def learning_rate_at(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int = 0,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
) -> float:
    """The learning rate of optimizer step `step` (from 0): a linear warm-up, then the schedule.

    A pure function of the step, so a checkpoint needs no scheduler state. The linear schedule ends at 0 one
    step after the last: the last step still updates the weights.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak


def steps_per_epoch(num_examples: int, config: Config) -> int:
    """Optimizer steps in one pass over the data; the last one may have fewer batches."""
    return math.ceil(math.ceil(num_examples / config.rows_per_batch) / config.gradient_accumulation_steps)


def total_steps(num_examples: int, config: Config) -> int:
    """Optimizer steps of the run."""
    return config.max_steps or math.ceil(config.epochs * steps_per_epoch(num_examples, config))


def times_due(every: int, first_step: int, last_step: int) -> int:
    """How often something is due after `first_step` that is done every so many steps, and after the last one."""
    return last_step // every - first_step // every + (last_step % every != 0 and last_step > first_step)


def planned_work(
    config: Config, examples: Mapping[str, Sequence[object]], general_windows: int, step: int
) -> dict[str, float]:
    """What a run does beside its steps after `step`: examples and windows of general text to evaluate, and saves.

    Args:
        config: the settings.
        examples: of each split.
        general_windows: of the text for `--forgetting`.
        step: optimizer steps that are done.
    """
    last_step = total_steps(len(examples["train"]), config)
    evaluations = times_due(config.eval_steps, step, last_step)
    return {
        "evaluating": evaluations * len(examples["validation"]) + len(examples.get("test", [])),
        "general text": evaluations * general_windows,
        "saving": times_due(config.save_steps, step, last_step),
    }


def windows(num_examples: int, config: Config, first_step: int) -> Iterator[list[Sequence[int]]]:
    """For each optimizer step from `first_step` on, its batches, each as the row numbers of its examples.

    These are the batches of all ranks together; `Ranks.local_examples` selects those of one rank.
    """
    per_epoch, last_step = steps_per_epoch(num_examples, config), total_steps(num_examples, config)
    for epoch in range(first_step // per_epoch, math.ceil(last_step / per_epoch)):
        order = epoch_order(num_examples, config.seed, epoch)
        first_of_epoch = epoch * per_epoch
        for step in range(max(first_step, first_of_epoch), min(first_of_epoch + per_epoch, last_step)):
            start = (step - first_of_epoch) * config.rows_per_step
            window = order[start : start + config.rows_per_step]
            yield [window[i : i + config.rows_per_batch] for i in range(0, len(window), config.rows_per_batch)]


class SaveSchedule:
    """The steps after which a checkpoint is saved: every `save_steps`, or later while saves are deferred.

    With `keep_best` the checkpoint of the best evaluation is never deferred: no later one has its weights.
    """

    def __init__(self, config: Config, defers: Callable[[State], bool]) -> None:
        """`defers` is called only for saves that may be deferred, on all ranks alike."""
        self._config, self._defers = config, defers
        self._is_waiting = False

    def are_due(self, state: State, *, must: bool) -> bool:
        """Whether to save now. With `must`, as after the last step, the save is not deferred."""
        must = must or (self._config.keep_best and state.best_step == state.step)
        self._is_waiting = self._is_waiting or state.step % self._config.save_steps == 0
        is_due = must or (self._is_waiting and not self._defers(state))
        self._is_waiting = self._is_waiting and not is_due
        return is_due


def rows_of_step(num_examples: int, config: Config, step: int) -> list[int]:
    """The row numbers of the examples that optimizer step `step` (from 0) reads."""
    return [row for rows in next(windows(num_examples, config, step)) for row in rows]
