"""A trace of a few training steps by torch.profiler, for `--profile`.

The trace has every operator and, on a GPU, every kernel, with its start and duration. Perfetto or chrome://tracing show
it. See https://docs.pytorch.org/docs/stable/profiler.html.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from ft.errors import UsageError, shown

WAIT = 10  # steps that are left out: the first ones allocate memory, choose kernels and compile
WARM_UP = 1  # steps that are profiled and dropped: starting the profiler takes time
ACTIVE = 3  # steps in the trace, which bound its size


def require_writable(path: Path) -> None:
    """Check that a trace can be written, before the run spends time on training.

    Raises:
        UsageError: it cannot.
    """
    exists = os.path.lexists(path)
    if exists and not os.path.isfile(path):
        raise UsageError(f"--profile is {shown(str(path))}, it must be a file")
    try:
        path.open("ab").close()
        if not exists:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"--profile is {shown(str(path))}, which cannot be written: {error.strerror}: name a file in a directory "
            "that exists"
        ) from error


@contextmanager
def trace_steps(
    path: Path | None, first_step: int, last_step: int, report: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """A context that writes a trace of `ACTIVE` steps after `WAIT + WARM_UP` others; of fewer in a shorter run.

    Args:
        path: the file, in Chrome's JSON format, compressed if its name ends in .gz; None for no trace.
        first_step: steps that are done already.
        last_step: steps of the run.
        report: prints a line.

    Yields:
        A function to call after each step.
    """
    steps = last_step - first_step
    if path is None or steps < WARM_UP + 1:
        if path is not None and steps > 0:
            report(f"WARNING: --profile needs a run of at least {WARM_UP + 1} steps: no trace is written.")
        yield lambda: None
        return
    active = min(ACTIVE, steps - WARM_UP)
    wait = min(WAIT, steps - WARM_UP - active)
    first = first_step + wait + WARM_UP + 1
    finished = False

    def write(profiler: profile) -> None:
        nonlocal finished
        finished = True
        try:
            profiler.export_chrome_trace(str(path))
            size = path.stat().st_size
        except (OSError, RuntimeError) as error:
            report(f"WARNING: the trace cannot be written to {path}: {error}")
            return
        report(
            f"Trace of the steps {first:,} to {first + active - 1:,} written to {path} ({size / 1e6:.1f} MB): open it "
            "at https://ui.perfetto.dev or chrome://tracing."
        )

    plan = schedule(wait=wait, warmup=WARM_UP, active=active, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:

        def after_step() -> None:
            if not finished:
                profiler.step()

        yield after_step
