"""The progress bar, the log lines, and metrics.jsonl."""

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ft.errors import FtError, printable
from ft.io.lock import DirectoryLock
from ft.io.plain_files import is_at, open_to_write
from ft.io.progress import Count, RunBar, TimeLeft, can_show_bar
from ft.train.tensorboard import EventFiles
from ft.train.timing import StepIntervals, StepTimes


class MetricsLogger:
    """Shows progress and writes metrics; used as a context manager around the training loop."""

    def __init__(
        self,
        metrics_path: Path | None,
        *,
        total_steps: int,
        first_step: int,
        metrics_bytes: int,
        tensorboard: EventFiles | None = None,
        lock: DirectoryLock | None = None,
        planned: Mapping[str, float] | None = None,
        quiet: bool = False,
        each_step: bool = True,
    ) -> None:
        """Open the metrics file and truncate it to `metrics_bytes`: a run that was interrupted wrote what follows.

        Args:
            metrics_path: None on all ranks but rank 0, which then write nothing and show no bar.
            total_steps: optimizer steps of the run.
            first_step: steps that are already done.
            metrics_bytes: `State.metrics_bytes`.
            tensorboard: also gets each event.
            each_step: time each step; on a GPU the host does not see its end.
            lock: of the run directory; with it, files that are moved or deleted during the run are restored.
            planned: units of each kind of work between the steps, by the names that `pause` gets, for the time left.
            quiet: show no bar.

        Raises:
            FtError: the file is a symbolic link or a FIFO.
        """
        self._path, self._lock = metrics_path, lock
        self._file = _opened(metrics_path)
        self._pending = b""
        self._tensorboard = tensorboard
        if metrics_path is not None:
            if metrics_path.stat().st_size < metrics_bytes:
                print(f"WARNING: {printable(str(metrics_path))} is too short: lines of earlier steps are missing.")
            else:
                self._file.truncate(metrics_bytes)
            self._file.seek(0, 2)  # truncating does not move the position
        self._time_left = TimeLeft({"training": total_steps - first_step, **(planned or {})})
        shows_bar = metrics_path is not None and not quiet and can_show_bar()
        self._bar = RunBar(total=total_steps, initial=first_step, time_left=self._time_left, is_shown=shows_bar)
        self.times, self.intervals = StepTimes(), StepIntervals(each_step=each_step)
        self._started = time.perf_counter()
        self._paused = 0.0
        self._counted = self._started  # when work was last counted for the time left
        self._examples = self._tokens = self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        try:
            if kind is None:
                with suppress(OSError):
                    self._restore()
                    self._write_pending()
        finally:
            self._file.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()

    @property
    def metrics_bytes(self) -> int:
        """The size of metrics.jsonl after fsync.

        Raises:
            OSError: the disk is full, or writing fails.
        """
        self._restore()
        self._write_pending()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def print_line(self, text: str) -> None:
        """Print a line above the bar. A closed pipe does not end the run."""
        with suppress(OSError):
            self._bar.write(printable(text), file=sys.stdout)
            sys.stdout.flush()

    def count_step(self, examples: int, tokens: int) -> None:
        """Count an optimizer step that read this many examples and input tokens."""
        self._examples += examples
        self._tokens += tokens
        self.intervals.step_done(examples, tokens)
        self._steps += 1
        self._count_work("training", 1)
        self._bar.update()

    @contextmanager
    def pause(self, activity: str, kind: str | None = None, units: int = 1) -> Iterator[Count]:
        """A context whose time (evaluating, saving) does not count as training time.

        Args:
            activity: the part in `seconds_by_part`.
            kind: of the work, for the time left; default: the activity.
            units: of the work.

        Yields:
            A function to call with the number of units that are finished; those left count as finished at the end.
        """
        if self._steps:
            self.times.end_of_step()
        else:  # what was before the first step is no part of one
            self.times.skip()
        started = time.perf_counter()
        self._count_work("training", 0)
        kind, done = kind or activity, 0
        self._bar.show_activity(activity)

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            self._count_work(kind, finished)
            self._bar.show_activity(activity, done, units)

        yield count
        self._count_work(kind, units - done)
        self._bar.show_activity("training")
        seconds = time.perf_counter() - started
        self._paused += seconds
        self.intervals.leave_out(seconds)
        self.times.mark(activity)

    def _count_work(self, kind: str, units: int) -> None:
        now = time.perf_counter()
        self._time_left.count(kind, units, now - self._counted)
        self._counted = now

    def log_training(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Log the mean loss since the last call, and the speed over the same steps."""
        self.times.end_of_step()
        self.intervals.values_read()
        now = time.perf_counter()
        seconds = now - self._started - self._paused
        speed = {"samples_per_second": self._examples / seconds, "tokens_per_second": self._tokens / seconds}
        self._started, self._paused, self._examples, self._tokens = now, 0.0, 0, 0
        # The norm is NaN or inf if gradients overflowed in fp16, whose step was skipped; the loss is NaN if all steps
        # since the last line were skipped. JSON has neither, so `write` writes null.
        overflowed = not math.isfinite(grad_norm)
        figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self.write(step, epoch, {**figures, **{name: round(value, 2) for name, value in speed.items()}})
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {speed['samples_per_second']:.1f} examples/s"
        )
        self.print_line(
            f"step {step:>6}  epoch {epoch:5.2f}  loss {loss:8.4f}  lr {learning_rate:.2e}  grad norm "
            f"{'overflow' if overflowed else format(grad_norm, '8.3f')}  {speed['samples_per_second']:6.1f} examples/s"
        )

    def log_evaluation(
        self,
        step: int,
        epoch: float,
        *,
        loss: float,
        accuracy: float,
        macro_f1: float | None = None,
        baseline: float | None = None,
        rows_sha256: str | None = None,
        split: str = "eval",
    ) -> None:
        """Log loss and accuracy of a split, and for labels the macro F1 and the majority baseline of the accuracy.

        With `rows_sha256` the event names the rows of the split: only figures of the same rows can be compared.
        """
        figures: dict[str, Any] = {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        name = "validation" if split == "eval" else split
        line = f"step {step:>6}  epoch {epoch:5.2f}  {name} loss {loss:.4f}, accuracy {accuracy:.2%}"
        if macro_f1 is not None and baseline is not None:
            figures |= {f"{split}_macro_f1": macro_f1, f"{split}_majority_baseline": baseline}
            line += f" (majority baseline {baseline:.2%}), macro F1 {macro_f1:.4f}"
        if rows_sha256 is not None:
            figures[f"{split}_rows_sha256"] = rows_sha256
        self.write(step, epoch, figures)
        self.print_line(line)

    def log_general_text(self, step: int, epoch: float, *, loss: float, perplexity: float) -> None:
        """Log loss and perplexity on general text, which measure forgetting."""
        self.write(step, epoch, {"general_loss": loss, "general_perplexity": perplexity})
        self.print_line(
            f"step {step:>6}  epoch {epoch:5.2f}  general text loss {loss:.4f}, perplexity {perplexity:.2f}"
        )

    def log_hyperparameters(self, step: int, settings: dict[str, Any], metrics: Sequence[str]) -> None:
        """Write the settings of the run and the names of its metrics to the event files, if there are any."""
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.write_hyperparameters(settings, metrics, step)

    def write(self, step: int, epoch: float, figures: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl, with the seconds by part since the last one.

        If the disk is full, the next event tries again.

        Raises:
            FtError: the run directory was moved or deleted, and another run has started in its place.
        """
        if seconds_by_part := self.times.take():
            figures = {**figures, "seconds_by_part": seconds_by_part}
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}
        self._pending += (json.dumps({"step": step, "epoch": round(epoch, 4), **finite}) + "\n").encode()
        with suppress(OSError):
            self._restore()
            self._write_pending()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.write(step, finite)

    def _restore(self) -> None:
        """Restore the file and the lock if they or their directory were moved or deleted, and print a warning.

        The open file still has all lines of the run.

        Raises:
            FtError: another run has started in the directory.
            OSError: the disk is full, or writing fails; the next call tries again.
        """
        if self._path is None:
            return
        lost = self._lock is not None and self._lock.restore()
        if not is_at(self._file.fileno(), self._path):
            lost = True
            try:
                file = _opened(self._path)
            except FtError as error:
                raise OSError(errno.EINVAL, str(error), str(self._path)) from error
            with self._file:
                self._file.seek(0)
                self._pending = self._file.read() + self._pending
            file.truncate(0)
            self._file = file
        elif os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0, os.SEEK_END)
            self.print_line(f"WARNING: {self._path} was truncated during the run: lines of earlier steps are missing.")
        if lost:
            if self._tensorboard is not None:
                self._tensorboard.restore()
            self.print_line(
                f"WARNING: {self._path.parent} or a file in it was moved or deleted during the run. The lock and "
                f"{self._path.name}, with all its lines, are restored there, and the run continues."
            )

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def _opened(path: Path | None) -> io.FileIO:
    descriptor = os.open(os.devnull, os.O_RDWR) if path is None else open_to_write(path)
    return os.fdopen(descriptor, "r+b", buffering=0)
