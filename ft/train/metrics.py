"""What a person and a program see of a run: the progress bar, log lines, and metrics.jsonl."""

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from ft.errors import FtError, printable
from ft.io.lock import DirectoryLock
from ft.io.plain_files import is_at, open_to_write
from ft.train.tensorboard import EventFiles
from ft.train.timing import StepTimes


class Report:
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
    ) -> None:
        """Open the metrics file at the length that the state says; later lines are of a run that broke off.

        Without a path nothing is written and no bar is shown: so it is in all processes of a run but one. With the
        `lock` of its folder, what is moved or deleted there during the run is put back.

        Raises:
            FtError: the file is a link, what it leads to would be cut, or a FIFO.
        """
        self._path, self._lock = metrics_path, lock
        self._file = _opened(metrics_path)
        self._pending = b""
        self._tensorboard = tensorboard
        if metrics_path is not None:
            if metrics_path.stat().st_size < metrics_bytes:
                print(f"WARNING: {printable(str(metrics_path))} has lost its end: lines of earlier steps are missing.")
            else:
                self._file.truncate(metrics_bytes)
            self._file.seek(0, 2)  # truncating leaves the position, which `metrics_bytes` tells, behind the new end
        # On a terminal a bar, elsewhere (a file, a pipe) only the log lines, whole ones.
        shows_bar = metrics_path is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not shows_bar)
        self.times = StepTimes()
        self._started = time.perf_counter()
        self._paused = 0.0
        self._examples = self._tokens = 0

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
        """The length of metrics.jsonl, all of which is on the disk.

        Raises:
            OSError: the disk does not take it.
        """
        self._restore()
        self._write_pending()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def line(self, text: str) -> None:
        """Print a line for people, above the bar. Nobody may be reading any more: that is no reason to end a run."""
        with suppress(OSError):
            self._bar.write(printable(text), file=sys.stdout)
            sys.stdout.flush()

    def step(self, examples: int, tokens: int) -> None:
        """Count an optimizer step that saw this many examples and input tokens."""
        self._examples += examples
        self._tokens += tokens
        self._bar.update()

    @contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Leave the time spent inside (evaluating, saving) out of the training speed."""
        self.times.end_of_step()
        started = time.perf_counter()
        self._bar.set_description(activity)
        yield
        self._bar.set_description("training")
        self._paused += time.perf_counter() - started
        self.times.mark(activity)

    def training(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Log the mean loss since the last such line, and the speed over the same steps."""
        self.times.end_of_step()
        now = time.perf_counter()
        seconds = now - self._started - self._paused
        speed = {"samples_per_second": self._examples / seconds, "tokens_per_second": self._tokens / seconds}
        self._started, self._paused, self._examples, self._tokens = now, 0.0, 0, 0
        # Gradients that overflowed in fp16 have no norm; their step was skipped. Where all steps since the last line
        # were skipped, there is no mean loss either. JSON has no infinities, and `write` puts null for them.
        overflowed = not math.isfinite(grad_norm)
        figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self.write(step, epoch, {**figures, **{name: round(value, 2) for name, value in speed.items()}})
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {speed['samples_per_second']:.1f} examples/s"
        )
        self.line(
            f"step {step:>6}  epoch {epoch:5.2f}  loss {loss:8.4f}  lr {learning_rate:.2e}  grad norm "
            f"{'overflow' if overflowed else format(grad_norm, '8.3f')}  {speed['samples_per_second']:6.1f} examples/s"
        )

    def evaluation(self, step: int, epoch: float, *, loss: float, accuracy: float, split: str = "eval") -> None:
        """Log loss and accuracy of a whole split."""
        self.write(step, epoch, {f"{split}_loss": loss, f"{split}_accuracy": accuracy})
        name = "validation" if split == "eval" else split
        self.line(f"step {step:>6}  epoch {epoch:5.2f}  {name} loss {loss:.4f}, accuracy {accuracy:.2%}")

    def general_text(self, step: int, epoch: float, *, loss: float, perplexity: float) -> None:
        """Log what a text that has nothing to do with the training data is to the model."""
        self.write(step, epoch, {"general_loss": loss, "general_perplexity": perplexity})
        self.line(f"step {step:>6}  epoch {epoch:5.2f}  general text loss {loss:.4f}, perplexity {perplexity:.2f}")

    def write(self, step: int, epoch: float, figures: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl, with where the time since the last one went.

        What a full disk does not take is tried again with the next event.

        Raises:
            FtError: the folder was moved or deleted, and another run has begun in its place.
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
        """Put the file and the lock back if they or their folder were moved or deleted, and say so.

        The file that is open still has all lines of the run, whatever became of its name.

        Raises:
            FtError: another run has begun in the folder.
            OSError: the disk is full, or refuses; the next call tries again.
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
        if lost:
            if self._tensorboard is not None:
                self._tensorboard.restore()
            self.line(
                f"WARNING: {self._path.parent} or a file in it was moved or deleted during the run. The lock and "
                f"{self._path.name}, with all its lines, are restored there, and the run goes on in it."
            )

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def _opened(path: Path | None) -> io.FileIO:
    descriptor = os.open(os.devnull, os.O_RDWR) if path is None else open_to_write(path)
    return os.fdopen(descriptor, "r+b", buffering=0)
