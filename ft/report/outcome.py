"""The results of a finished run, for its closing summary and its model card."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ft.evaluation.evaluate import Evaluation
from ft.train.state import State
from ft.train.timing import Speed


@dataclass(frozen=True)
class Performance:
    """How fast the steps of a run were, and the memory that they took.

    Attributes:
        speed: of the steps of this process.
        flops_per_second: the operations that the loss needs (ft/model/flops.py), per second of training.
        peak_memory_bytes: of rank 0: on a CUDA device the peak of what PyTorch had allocated there during this run,
            else resident memory since the start of the process; None if not known.
    """

    speed: Speed
    flops_per_second: float
    peak_memory_bytes: int | None

    def __str__(self) -> str:
        speed = self.speed
        means = f", each a mean of {speed.steps_per_interval:.0f} steps" if speed.steps_per_interval > 1 else ""
        memory = "" if self.peak_memory_bytes is None else f"; peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        return (
            f"Step time {1000 * speed.median:,.1f} ms median, {1000 * speed.percentile_90:,.1f} ms 90th percentile"
            f"{means}; {speed.tokens_per_second:,.0f} tokens/s; {self.flops_per_second / 1e12:.3g} TFLOP/s "
            f"that the loss needs{memory}."
        )


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run.

    Attributes:
        state: after the last step.
        test: the evaluation of the test split; None without one.
        seconds: the time of the run, including earlier processes.
        baselines: for each split the accuracy of always answering with the most frequent training label; empty without
            labels.
        performance: None if this process took no step.
    """

    state: State
    test: Evaluation | None
    seconds: float
    baselines: Mapping[str, float] = field(default_factory=dict)
    performance: Performance | None = None

    def summary(self) -> dict[str, float | int | None]:
        """The figures of summary.json, from which `python run.py runs` takes time and memory."""
        figures: dict[str, float | int | None] = {"step": self.state.step, "seconds": self.seconds}
        if self.performance is not None:
            speed = self.performance.speed
            figures |= {
                "step_seconds_median": speed.median,
                "step_seconds_90th_percentile": speed.percentile_90,
                "steps_per_interval": speed.steps_per_interval,
                "samples_per_second": speed.samples_per_second,
                "tokens_per_second": speed.tokens_per_second,
                "flops_per_second": self.performance.flops_per_second,
                "peak_memory_bytes": self.performance.peak_memory_bytes,
            }
        return figures

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
