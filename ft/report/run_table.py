"""A table of runs: one row per run directory, read without importing PyTorch."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ft.config import Config
from ft.errors import FtError, one_line, printable
from ft.io.lock import LOCK, is_locked
from ft.io.plain_files import read_regular
from ft.report.run_record import (
    IGNORED_SETTINGS,
    MOST_SHOWN,
    Recorded,
    best_runs,
    common_metric,
    formatted,
    is_finished,
    is_number,
    number_data_sets,
    read_events,
)
from ft.train.state import evaluation_rank

SORT_KEYS = ("best", "name", "accuracy", "macro_f1", "loss", "test_accuracy", "test_macro_f1", "step", "seconds")
ASCENDING = ("name", "loss", "seconds")
MOST_CHARACTERS = 100  # of the settings in the table for people


@dataclass(frozen=True)
class RunRow:
    """One run of the table. A figure that is not recorded is None.

    Attributes:
        name: the path below the directory of the table.
        state: finished, running, interrupted or damaged.
        problem: why it is damaged; None if it is not.
        step: the last step in metrics.jsonl.
        data_set: the number of the validation rows, the same for runs whose figures can be compared; None without an
            evaluation.
        is_best: whether this run has the best evaluation on its validation rows.
        best_metric: by which the best evaluation is chosen.
        best_step, best_accuracy, best_macro_f1, best_loss: the best evaluation of the validation split.
        accuracy, macro_f1, loss: the last one.
        majority_baseline: the accuracy of always answering with the most frequent training label, on that split.
        test_accuracy, test_macro_f1: of the test split.
        seconds: the time of the run.
        peak_memory_bytes: of the run on a CUDA device, else of its process: see `peak_memory` in ft/device.py.
        settings: those in which the runs of the table differ.
    """

    name: str
    state: str
    problem: str | None = None
    step: int | None = None
    data_set: int | None = None
    is_best: bool = False
    best_metric: str = Config.best_metric
    best_step: int | None = None
    best_accuracy: float | None = None
    best_macro_f1: float | None = None
    best_loss: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    loss: float | None = None
    majority_baseline: float | None = None
    test_accuracy: float | None = None
    test_macro_f1: float | None = None
    seconds: float | None = None
    peak_memory_bytes: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_table(directory: Path) -> list[RunRow]:
    """The runs in and below a directory, by name; a damaged one has a row with the reason."""
    rows, runs = [], []
    for path in find_runs(directory):
        row, run = _read_row(path, str(path.relative_to(directory)) if path != directory else path.resolve().name)
        rows.append(row)
        runs.append(run)
    defaults = json.loads(json.dumps(asdict(Config())))  # a key that an earlier version did not write has its default
    names = [name for name in defaults if name not in IGNORED_SETTINGS]
    values = [
        {name: config.get(name, defaults[name]) for name in names} if config else {}
        for config in (run.config for run in runs)
    ]
    differ = [name for name in names if len({repr(each[name]) for each in values if each}) > 1]
    data_sets = number_data_sets(runs)
    best = set(map(id, best_runs(runs, data_sets)))
    return [
        replace(
            row,
            data_set=data_set,
            is_best=id(run) in best,
            settings={name: each[name] for name in differ} if each else {},
        )
        for row, run, data_set, each in zip(rows, runs, data_sets, values, strict=True)
    ]


def find_runs(directory: Path) -> Iterator[Path]:
    """The run directories in and below a directory; links are not followed, and runs not searched for others."""
    for parent, directories, files in os.walk(directory):
        if {LOCK, "metrics.jsonl"} & set(files) or any(re.fullmatch("checkpoint-[0-9]+", name) for name in directories):
            directories.clear()
            yield Path(parent)
        directories.sort()


def _read_row(path: Path, name: str) -> tuple[RunRow, Recorded]:
    """A run without its settings and data set, and its record; without a config.json if that cannot be read."""
    problems, config, events = [], {}, []
    try:
        config = json.loads(read_regular(path / "config.json"))
        if not isinstance(config, dict):
            config = {}
            problems.append("config.json is not an object")
    except OSError as error:
        problems.append(f"config.json cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError):
        problems.append("config.json is not JSON")
    try:
        events = read_events(path / "metrics.jsonl")
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read: {error.strerror or error}")
    run = Recorded(path, name, config, events, None, is_finished(path))
    state = "running" if is_locked(path) else "finished" if run.finished else "interrupted"
    if problems and state != "running":  # a run that has just started has not written them yet
        state = "damaged"
    best = run.best_evaluation() or {}
    summary = _summary(path)
    seconds = summary.get("seconds", sum(run.seconds_by_part().values()) or None)
    figures: dict[str, Any] = {
        f"best_{figure}": _number(best.get(f"eval_{figure}")) for figure in ("accuracy", "macro_f1", "loss")
    }
    figures |= {figure: run.last(f"eval_{figure}") for figure in ("accuracy", "macro_f1", "loss", "majority_baseline")}
    figures |= {f"test_{figure}": run.last(f"test_{figure}") for figure in ("accuracy", "macro_f1")}
    row = RunRow(
        name,
        state,
        "; ".join(problems) if state == "damaged" else None,
        step=_whole(run.last("step")),
        best_metric=run.best_metric,
        best_step=_whole(best.get("step")),
        **figures,
        seconds=_number(seconds),
        peak_memory_bytes=_number(summary.get("peak_memory_bytes")),
    )
    return row, run


def _summary(path: Path) -> dict[str, Any]:
    """The content of summary.json, which a run writes at its end; empty without a valid one."""
    try:
        summary = json.loads(read_regular(path / "summary.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _number(value: Any) -> Any:  # noqa: ANN401
    return value if is_number(value) else None


def _whole(value: Any) -> int | None:  # noqa: ANN401
    return int(value) if is_number(value) else None


def sorted_rows(rows: Sequence[RunRow], key: str) -> list[RunRow]:
    """The rows with the best or largest first, for names, losses and seconds the smallest; those without it last.

    Args:
        rows: the runs.
        key: one of `SORT_KEYS`; `best` is the best evaluation on each set of validation rows in turn, by the metric
            of the runs on it, by accuracy if they differ.
    """
    metrics = {
        number: common_metric(row.best_metric for row in rows if row.data_set == number)
        for number in {row.data_set for row in rows}
    }

    def value(row: RunRow) -> Any:  # noqa: ANN401
        if key != "best":
            return getattr(row, key)
        if row.best_loss is None or row.best_accuracy is None:
            return None
        rank = evaluation_rank(metrics[row.data_set], row.best_loss, row.best_accuracy, row.best_macro_f1)
        return (-(row.data_set or 0), *rank)  # figures on different rows cannot be compared

    known = [row for row in rows if value(row) is not None]
    return sorted(known, key=value, reverse=key not in ASCENDING) + [row for row in rows if value(row) is None]


def as_json(rows: Sequence[RunRow]) -> str:
    """The rows as a JSON list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def as_csv(rows: Sequence[RunRow]) -> str:
    r"""The rows as CSV, with a column `setting_NAME` for each setting in which they differ.

    What is not printable in a name or setting is escaped (`\x1b`), so that a terminal can show the file; JSON is exact.
    """
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    columns = [name for name in RunRow.__dataclass_fields__ if name != "settings"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*columns, *(f"setting_{name}" for name in settings)])
    for row in rows:
        values = [*(getattr(row, name) for name in columns), *(row.settings.get(name) for name in settings)]
        writer.writerow([x if x is None or is_number(x) else printable(str(x)) for x in values])
    return file.getvalue()


def as_text(rows: Sequence[RunRow]) -> str:
    """The rows as an aligned table for people; a column without a figure is left out."""
    best, final = ("best acc", "at step", "best F1"), ("final acc", "final F1", "final loss", "baseline")
    has_several_data_sets = sum(row.is_best for row in rows) > 1
    heads = ("run", "state", "rows", *best, *final, "test acc", "test F1", "time", "memory", "settings that differ")
    table = [list(heads)]
    for row in rows:
        data_set = f"{row.data_set}{', best' * row.is_best}" if has_several_data_sets and row.data_set else ""
        settings = ", ".join(f"{name} {'not set' if x is None else x}" for name, x in row.settings.items())
        shares = {name: _shown(getattr(row, name), "{:.2%}") for name in ("best_accuracy", "accuracy", "test_accuracy")}
        table.append(
            [
                one_line(row.name, 40),
                _state(row),
                data_set,
                shares["best_accuracy"],
                _shown(row.best_step, "{:,}"),
                _shown(row.best_macro_f1, "{:.4f}"),
                shares["accuracy"],
                _shown(row.macro_f1, "{:.4f}"),
                _shown(row.loss, "{:.4f}"),
                _shown(row.majority_baseline, "{:.2%}"),
                shares["test_accuracy"],
                _shown(row.test_macro_f1, "{:.4f}"),
                _duration(row.seconds),
                "" if row.peak_memory_bytes is None else _shown(row.peak_memory_bytes / 1e9, "{:.2f}") + " GB",
                one_line(row.problem or settings, MOST_CHARACTERS),
            ]
        )
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    is_text = [column[0] in ("run", "state", "rows", "settings that differ") for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
    if has_several_data_sets:
        lines.append(
            "rows: runs with the same number have the same validation rows, and only their figures can be compared.\n"
            "Without a validation split, --seed draws these rows."
        )
    return "\n".join(lines)


def _state(row: RunRow) -> str:
    """The state of a run, with its last step."""
    step = _shown(row.step or 0, "{:,}")
    if row.state == "interrupted":
        return f"interrupted at step {step}"
    if row.step is None or row.state == "damaged":
        return row.state
    return f"running, step {step}" if row.state == "running" else f"finished, {step} step{'s' * (row.step != 1)}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else formatted(value, form)


def _duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return ""
    if seconds >= MOST_SHOWN:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def require_runs(rows: Sequence[RunRow], directory: Path) -> None:
    """Check that there are runs.

    Raises:
        FtError: there is none.
    """
    if not rows:
        raise FtError(f"there is no run in or below {directory}: name the directory that holds the run directories")
