"""The progress of a run: with the tensors of a checkpoint it is all that is needed to resume."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ft.errors import FtError

MAX_STEPS, MAX_BYTES, MAX_SECONDS = 2**53, 2**63, 1e10
# The limits of each field of a state: a test of the value, given the state, and the limit in words. The newest losses
# may be NaN or inf, as evaluations can overflow.
_LIMITS: dict[str, tuple[Callable[[Any, "State"], bool], str]] = {
    "step": (lambda x, _: 0 <= x < MAX_STEPS, f"from 0 to below {MAX_STEPS}"),
    **dict.fromkeys(
        ("loss_steps", "skipped_steps", "evaluations_since_best"),
        (lambda x, state: 0 <= x <= state.step + 1, "from 0 to the step"),  # one evaluation may be before all steps
    ),
    "best_step": (lambda x, state: 0 <= x <= state.step, "from 0 to the step"),
    **dict.fromkeys(
        ("best_accuracy", "last_accuracy", "best_macro_f1", "last_macro_f1"), (lambda x, _: 0 <= x <= 1, "from 0 to 1")
    ),
    **dict.fromkeys(("loss_sum", "train_loss_sum", "best_loss"), (lambda x, _: abs(x) < 1e300, "finite")),
    **dict.fromkeys(
        ("last_loss", "general_loss_before", "general_loss"),
        (lambda x, _: type(x) is float or abs(x) < 1e300, "a float"),
    ),
    "precision": (lambda x, _: x in ("", "fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    "metrics_bytes": (lambda x, _: 0 <= x < MAX_BYTES, f"from 0 to below {MAX_BYTES}"),
    "seconds": (lambda x, _: 0 <= x <= MAX_SECONDS, f"from 0 to {MAX_SECONDS:g}"),
}


@dataclass
class State:
    """The progress of a run besides its tensors. The position in the data follows from `step`.

    Attributes:
        step: optimizer steps done.
        loss_sum: sum of the training losses since they were last logged.
        loss_steps: number of losses in that sum.
        train_loss_sum: sum of the training losses of all steps that were logged.
        skipped_steps: steps whose update was skipped, because the loss or gradient was not finite.
        evaluation_due: the run was stopped before or during the evaluation of this step.
        best_step, best_accuracy, best_loss, best_macro_f1: the best evaluation so far, by `--best-metric`, then loss;
            without labels there is no macro F1.
        last_accuracy, last_loss, last_macro_f1: those of the newest evaluation.
        evaluations_since_best: number of evaluations since the best one.
        general_loss_before, general_loss: the loss on general text before the first step, and the newest.
        data: the SHA-256 of the examples of all splits.
        precision: the format of matrix products; "" in checkpoints of earlier versions.
        metrics_bytes: the size of metrics.jsonl at this step; on resume the file is truncated to it.
        seconds: time spent in the run, including earlier processes.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    train_loss_sum: float = 0.0
    skipped_steps: int = 0
    evaluation_due: bool = False
    best_step: int | None = None
    best_accuracy: float = 0.0
    best_loss: float | None = None
    best_macro_f1: float | None = None
    last_accuracy: float = 0.0
    last_loss: float | None = None
    last_macro_f1: float | None = None
    evaluations_since_best: int = 0
    general_loss_before: float | None = None
    general_loss: float | None = None
    data: str = ""
    precision: str = ""
    metrics_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The state with these values; missing ones, as in files of earlier versions, have their defaults.

        Raises:
            FtError: a field is unknown, of the wrong type, or outside its limits; names the field, value and limit.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(values.keys() - known.keys()) or sorted({"step"} - values.keys()):
            raise FtError(f"{unknown[0]} is {'unknown' if unknown[0] in values else 'missing'}")
        kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}
        for name, value in values.items():
            wanted = str(getattr(known[name].type, "__name__", known[name].type))
            if type(value) not in [kind for each in wanted.split(" | ") for kind in kinds[each]]:
                raise FtError(f"{name} is {str(value)[:40]!r}, it must be of type {wanted}")
        state = cls(**values)
        for name, (is_possible, limit) in _LIMITS.items():
            value = getattr(state, name)
            if value is not None and not is_possible(value, state):
                raise FtError(f"{name} is {str(value)[:40]}, it must be {limit}")
        return state

    @property
    def mean_train_loss(self) -> float:
        """The mean training loss of all steps that updated the weights."""
        return (self.train_loss_sum + self.loss_sum) / max(1, self.step - self.skipped_steps)

    def record_losses(self, loss_sum: float) -> float:
        """Record the sum of losses since they were last logged. Returns their mean, NaN if all steps were skipped."""
        mean = loss_sum / self.loss_steps if self.loss_steps else math.nan
        self.train_loss_sum += loss_sum
        self.loss_steps = 0
        return mean

    def record_evaluation(
        self, loss: float, accuracy: float, macro_f1: float | None = None, metric: str = "accuracy"
    ) -> None:
        """Record the result of an evaluation; `metric` is loss, accuracy or macro_f1, by which one is the best."""
        self.evaluation_due = False
        self.last_accuracy, self.last_loss, self.last_macro_f1 = accuracy, loss, macro_f1
        better = self.best_loss is None or evaluation_rank(metric, loss, accuracy, macro_f1) > evaluation_rank(
            metric, self.best_loss, self.best_accuracy, self.best_macro_f1
        )
        if better and math.isfinite(loss):
            self.best_step = self.step
            self.best_accuracy, self.best_loss, self.best_macro_f1 = accuracy, loss, macro_f1
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations were not better than the best one; never if it is None."""
        return patience is not None and self.evaluations_since_best >= patience


def evaluation_rank(metric: str, loss: float, accuracy: float, macro_f1: float | None) -> tuple[float, float]:
    """What a better evaluation has more of: the metric, and at equal values less loss."""
    figures = {"loss": -loss, "accuracy": accuracy, "macro_f1": -1.0 if macro_f1 is None else macro_f1}
    return figures[metric], -loss
