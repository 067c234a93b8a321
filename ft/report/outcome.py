"""The results of a finished run, for its closing summary and its model card."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ft.evaluation.evaluate import Evaluation
from ft.train.state import State


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run.

    Attributes:
        state: after the last step.
        test: the evaluation of the test split; None without one.
        seconds: the time of the run, including earlier processes.
        baselines: for each split the accuracy of always answering with the most frequent training label; empty without
            labels.
    """

    state: State
    test: Evaluation | None
    seconds: float
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracy at the end of each split that was evaluated."""
        test = {} if self.test is None else {"test": self.test.accuracy}
        return {"validation": self.state.last_accuracy, **test}

    def baseline_note(self) -> str | None:
        """A sentence if the accuracy of a split is not above its majority baseline; None if all are."""
        below = [split for split, accuracy in self.accuracies.items() if accuracy <= self.baselines.get(split, -1.0)]
        if not below:
            return None
        return (
            f"The {' and '.join(below)} accuracy does not beat the majority baseline: always answering with the most "
            "frequent training label is as good or better."
        )
