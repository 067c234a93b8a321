"""The progress bar, the log lines, and metrics.jsonl."""

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
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
        """Open the metrics file and truncate it to `metrics_bytes`: a run that was interrupted wrote what follows.

        Args:
            metrics_path: None on all ranks but rank 0, which then write nothing and show no bar.
            total_steps: optimizer steps of the run.
            first_step: steps that are already done.
            metrics_bytes: `State.metrics_bytes`.
            tensorboard: also gets each event.
            lock: of the run directory; with it, files that are moved or deleted during the run are restored.

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
        # A bar only on a terminal or in a notebook; a file or a pipe gets the log lines.
        shows_bar = metrics_path is not None and (sys.stderr.isatty() or in_notebook())
        self._bar = _bar_class()(
            total=total_steps, initial=first_step, miniters=1, unit="step", dynamic_ncols=True, disable=not shows_bar
        )
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
        self._bar.update()

    @contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """A context whose time (evaluating, saving) does not count as training time."""
        self.times.end_of_step()
        started = time.perf_counter()
        self._bar.set_description(activity)
        yield
        self._bar.set_description("training")
        self._paused += time.perf_counter() - started
        self.times.mark(activity)

    def log_training(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Log the mean loss since the last call, and the speed over the same steps."""
        self.times.end_of_step()
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

    def log_evaluation(self, step: int, epoch: float, *, loss: float, accuracy: float, split: str = "eval") -> None:
        """Log loss and accuracy of a split."""
        self.write(step, epoch, {f"{split}_loss": loss, f"{split}_accuracy": accuracy})
        name = "validation" if split == "eval" else split
        self.print_line(f"step {step:>6}  epoch {epoch:5.2f}  {name} loss {loss:.4f}, accuracy {accuracy:.2%}")

    def log_general_text(self, step: int, epoch: float, *, loss: float, perplexity: float) -> None:
        """Log loss and perplexity on general text, which measure forgetting."""
        self.write(step, epoch, {"general_loss": loss, "general_perplexity": perplexity})
        self.print_line(
            f"step {step:>6}  epoch {epoch:5.2f}  general text loss {loss:.4f}, perplexity {perplexity:.2f}"
        )

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


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, by the criterion of `tqdm.autonotebook`."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _bar_class() -> Any:  # noqa: ANN401
    """The bar of this process; it starts no monitoring thread, which would outlive the run.

    The thread is for bars that skip updates, and with `miniters=1` none is skipped.
    """
    base = import_module("tqdm.auto").tqdm if in_notebook() else tqdm
    return type("Bar", (base,), {"monitor_interval": 0})


def _opened(path: Path | None) -> io.FileIO:
    descriptor = os.open(os.devnull, os.O_RDWR) if path is None else open_to_write(path)
    return os.fdopen(descriptor, "r+b", buffering=0)
