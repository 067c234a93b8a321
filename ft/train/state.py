"""Where a run stands, in a few numbers; with the tensors of a checkpoint it is all that the run needs to go on."""

import math
from dataclasses import dataclass


@dataclass
class State:
    """Where a run stands besides its tensors. The place in the data follows from `step` alone.

    Attributes:
        step: optimiser steps done.
        loss_sum: sum of the training losses since the last logged line.
        loss_steps: how many losses that sum holds.
        train_loss_sum: sum of the training losses of all steps up to the last logged line.
        skipped_steps: steps without an update, because loss or gradient was not finite.
        evaluation_due: the run was stopped before or in the evaluation that belongs to this step.
        best_step, best_accuracy, best_loss: the best evaluation so far, by accuracy, then loss.
        last_accuracy, last_loss: those of the newest evaluation.
        evaluations_since_best: how many evaluations in a row have not been better than the best.
        general_loss_before, general_loss: the loss on general text before the first step, and the newest.
        data: the SHA-256 of the examples that are trained on and judged by.
        metrics_bytes: the length of metrics.jsonl at this point; what a broken run wrote after it is cut off.
        seconds: time spent in the run, all its parts together.
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
    last_accuracy: float = 0.0
    last_loss: float | None = None
    evaluations_since_best: int = 0
    general_loss_before: float | None = None
    general_loss: float | None = None
    data: str = ""
    metrics_bytes: int = 0
    seconds: float = 0.0

    @property
    def mean_train_loss(self) -> float:
        """The mean training loss of all steps that updated the weights."""
        return (self.train_loss_sum + self.loss_sum) / max(1, self.step - self.skipped_steps)

    def note_losses(self, loss_sum: float) -> float:
        """The steps since the last logged line had losses of this sum. Their mean; no number if all were skipped."""
        mean = loss_sum / self.loss_steps if self.loss_steps else math.nan
        self.train_loss_sum += loss_sum
        self.loss_steps = 0
        return mean

    def note(self, loss: float, accuracy: float) -> None:
        """The evaluation that was due had this result."""
        self.evaluation_due, self.last_accuracy, self.last_loss = False, accuracy, loss
        better = self.best_loss is None or (accuracy, -loss) > (self.best_accuracy, -self.best_loss)
        if better and math.isfinite(loss):
            self.best_step, self.best_accuracy, self.best_loss = self.step, accuracy, loss
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row have not been better than the best; without a patience never."""
        return patience is not None and self.evaluations_since_best >= patience
