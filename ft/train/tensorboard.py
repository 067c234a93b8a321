"""The figures of metrics.jsonl once more, as event files that TensorBoard reads; only with --tensorboard."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.errors import FtError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFiles:
    """A folder of event files. They are a copy: a disk that does not take them is no reason to end a run."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Start another file; TensorBoard forgets what earlier ones say of steps after `first_step`.

        Raises:
            FtError: the package is not there, or `folder` is a link, behind which nothing is written.
        """
        if folder.is_symlink():
            raise FtError(f"{folder} is a link, and event files are not written behind it: delete the link")
        self._folder = folder
        # Nothing is before the first event, which is of step 0 where general text is measured.
        self._writer = summary_writer()(str(folder), purge_step=first_step + 1 if first_step else 0)

    def restore(self) -> None:
        """Begin another file if the folder has been moved or deleted; what the file before it held is not repeated."""
        if not self._folder.exists():
            with suppress(OSError):
                self._writer.close()
            self._writer = summary_writer()(str(self._folder))

    def write(self, step: int, figures: dict[str, Any], prefix: str = "") -> None:
        """Add the figures of one event, those of a group as group/figure; a figure that is null is left out.

        Raises:
            OSError: the disk is full, or refuses.
        """
        for name, value in figures.items():
            if isinstance(value, dict):
                self.write(step, value, f"{name}/")
            elif value is not None:
                self._writer.add_scalar(prefix + name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def summary_writer() -> "type[SummaryWriter]":
    """PyTorch's writer of event files.

    Raises:
        FtError: the package is not there.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FtError(
            f"--tensorboard needs a package that is not there ({error}): pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter
