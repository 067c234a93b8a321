"""The progress bar, in a terminal or a notebook, and the remaining time of a run."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm

_MEMORY = 0.95  # of a measured rate, per count: the last 20 counts weigh the most, and a slow first step fades
_REFRESH_SECONDS = 0.1  # as tqdm


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, by the criterion of `tqdm.autonotebook`."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def can_show_bar() -> bool:
    """Whether a bar can be seen: on a terminal or in a notebook. A file or a pipe gets no control characters."""
    return in_notebook() or sys.stderr.isatty()


def progress_bar(total: int | None, unit: str, *, quiet: bool = False) -> Any:  # noqa: ANN401
    """A bar for a command that is not a run, as a context manager with the method `update(count)`.

    Args:
        total: units of work; None if unknown.
        unit: what they are, in the singular.
        quiet: show no bar.
    """
    return tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, disable=quiet or not can_show_bar())


class TimeLeft:
    """Estimates the remaining seconds of a run, from the speed of each kind of work as measured so far."""

    def __init__(self, planned: Mapping[str, float]) -> None:
        """`planned` has the units of each kind of work in the run, such as `{"training": 1067}` for its steps."""
        self._left = dict(planned)
        self._measured: dict[str, tuple[float, float]] = {}  # units and seconds of each kind

    def count(self, kind: str, units: float, seconds: float) -> None:
        """Count finished units of a kind of work, and the seconds that they took."""
        before_units, before_seconds = self._measured.get(kind, (0.0, 0.0))
        self._measured[kind] = (_MEMORY * before_units + units, _MEMORY * before_seconds + seconds)
        self._left[kind] = max(0.0, self._left.get(kind, 0.0) - units)

    def seconds(self) -> float | None:
        """The estimate, without the kinds that have not been measured; None before the first training step."""
        if not self._measured.get("training", (0.0, 0.0))[0]:
            return None
        return sum(self._left[kind] / units * seconds for kind, (units, seconds) in self._measured.items() if units)


class RunBar(tqdm):  # type: ignore[misc]  # tqdm has no annotations
    """The bar of a run: its steps, what is done between them and how far, and the time left by `TimeLeft`."""

    monitor_interval = 0  # no monitoring thread, which would outlive a run in a notebook

    def __init__(self, *, total: int, initial: int, time_left: TimeLeft, is_shown: bool) -> None:
        self._time_left, self._refreshed = time_left, 0.0
        super().__init__(
            total=total,
            initial=initial,
            unit="step",
            dynamic_ncols=True,
            disable=not is_shown,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the bar's format, with `left`."""
        seconds = self._time_left.seconds()
        return {**super().format_dict, "left": "?" if seconds is None else self.format_interval(seconds)}

    def show_activity(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Show what the run does, and of how much it has done how much; at most ten times a second."""
        share = f" {done / total:.0%}" if total else ""
        self.set_description(activity + share, refresh=False)
        now = time.perf_counter()
        if not self.disable and (not done or now - self._refreshed >= _REFRESH_SECONDS):
            self._refreshed = now
            self.refresh()


Count = Callable[[int], object]  # called with the number of units that are finished


def no_progress(count: int) -> None:
    """Show nothing."""
