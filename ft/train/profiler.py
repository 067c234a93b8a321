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

    If the context ends before these steps, by a stop or an error, the trace has those that are complete, if any is.

    Args:
        path: the file, in Chrome's JSON format, compressed if its name ends in .gz; None for no trace.
        first_step: steps that are done already.
        last_step: steps of the run.
        report: prints a line.

    Yields:
        A function to call after each step.
    """
    if path is None:
        yield lambda: None
        return
    steps = last_step - first_step
    earlier = "; the file there is an earlier one" if path.exists() else ""
    if steps < WARM_UP + 1:
        needs = f"--profile needs at least {WARM_UP + 1} steps, and the run has {max(steps, 0)} to do"
        report(f"WARNING: {needs}: no trace is written to {path}{earlier}.")
        yield lambda: None
        return
    active = min(ACTIVE, steps - WARM_UP)
    wait = min(WAIT, steps - WARM_UP - active)
    first = first_step + wait + WARM_UP + 1
    step = first_step  # the last that is complete
    finished = False

    def write(profiler: profile) -> None:
        nonlocal finished
        if step < first:
            return
        finished = True
        try:
            profiler.export_chrome_trace(str(path))
            size = path.stat().st_size
        except (OSError, RuntimeError) as error:
            report(f"WARNING: the trace cannot be written to {path}: {error}")
            return
        is_cut = step < first + active - 1
        report(
            f"{'WARNING: the run ended while the trace was recorded. ' * is_cut}Trace of "
            f"{f'the steps {first:,} to {step:,}' if step > first else f'step {first:,}'} written to {path} "
            f"({size / 1e6:.1f} MB): open it at https://ui.perfetto.dev or chrome://tracing."
        )

    def after_step() -> None:
        nonlocal step
        step += 1
        if not finished:
            profiler.step()

    plan = schedule(wait=wait, warmup=WARM_UP, active=active, repeat=1)
    try:
        with profile(schedule=plan, on_trace_ready=write) as profiler:
            yield after_step
    finally:
        if not finished:
            steps_to_trace = f"the steps {first:,} to {first + active - 1:,}" if active > 1 else f"step {first:,}"
            report(
                f"WARNING: the run ended after step {step:,}, and --profile traces {steps_to_trace}: no trace is "
                f"written to {path}{earlier}."
            )
