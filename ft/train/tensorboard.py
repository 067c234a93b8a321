"""The figures of metrics.jsonl and the hyper-parameters as event files for TensorBoard, with --tensorboard."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.errors import FtError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFiles:
    """A directory of event files. They repeat metrics.jsonl, so a disk that is full does not end the run."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        """Start a new file; TensorBoard drops the events of earlier files after `first_step`.

        Raises:
            FtError: the package is not installed, or `directory` is a symbolic link, which is not followed.
        """
        if directory.is_symlink():
            raise FtError(f"{directory} is a symbolic link, which event files are not written to: delete the link")
        self._directory = directory
        # A new run purges nothing: its first event may be of step 0, which measures general text.
        self._writer = summary_writer()(str(directory), purge_step=first_step + 1 if first_step else 0)

    def restore(self) -> None:
        """Start a new file if the directory was moved or deleted; earlier events are not written again."""
        if not self._directory.exists():
            with suppress(OSError):
                self._writer.close()
            self._writer = summary_writer()(str(self._directory))

    def write(self, step: int, figures: dict[str, Any], prefix: str = "") -> None:
        """Write the figures of one event, nested ones as group/figure; null is left out.

        Raises:
            OSError: the disk is full, or writing fails.
        """
        for name, value in figures.items():
            if isinstance(value, dict):
                self.write(step, value, f"{name}/")
            elif not isinstance(value, str | None):  # an event file has numbers alone
                self._writer.add_scalar(prefix + name, value, step)
        self._writer.flush()

    def write_hyperparameters(self, settings: Mapping[str, Any], metrics: Sequence[str], step: int) -> None:
        """Write the settings of a run, for the tab HPARAMS, which compares runs by them.

        Not by `SummaryWriter.add_hparams`, which writes to another directory, as if it was another run.

        Args:
            settings: of the run; null is left out, and a list is written as text.
            metrics: the names of the figures that the tab shows beside the settings: the last one of each.
            step: the last step of the run.

        Raises:
            OSError: the disk is full, or writing fails.
        """
        from torch.utils.tensorboard.summary import hparams  # here, since tensorboard is optional

        shown = {
            name: value if isinstance(value, bool | int | float | str) else " ".join(value)
            for name, value in settings.items()
            if value is not None
        }
        for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]  # untyped in PyTorch
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def summary_writer() -> "type[SummaryWriter]":
    """PyTorch's writer of event files.

    Raises:
        FtError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FtError(
            f"--tensorboard needs a package that is not installed ({error}): pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter
