"""The part of a report that compares several runs: their newest metrics, and the settings in which they differ."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ft.report.markup import bdi, section, swatch, table, text
from ft.report.run_record import (
    IGNORED_SETTINGS,
    Recorded,
    best_runs,
    common_metric,
    formatted,
    is_number,
    number_data_sets,
)

HEADLINES = (
    ("eval_accuracy", "validation accuracy", "{:.2%}"),
    ("eval_macro_f1", "validation macro F1", "{:.4f}"),
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("test_macro_f1", "test macro F1", "{:.4f}"),
    ("eval_majority_baseline", "majority baseline", "{:.2%}"),
    ("eval_loss", "validation loss", "{:.4f}"),
    ("loss", "training loss", "{:.4f}"),
    ("samples_per_second", "examples/s", "{:,.1f}"),
    ("step", "steps", "{:,.0f}"),
)


def compared(runs: Sequence[Recorded]) -> str:
    """The legend, the newest metrics and the best evaluation of each run, and the settings in which they differ."""
    data_sets = number_data_sets(runs)
    best = best_runs(runs, data_sets)
    heads = [(key, words, form) for key, words, form in HEADLINES if any(run.last(key) is not None for run in runs)]
    rows = []
    for number, run in enumerate(runs):
        values = [(run.last(key), form) for key, _, form in heads]
        badge = ' <span class="state best">best</span>' if any(run is each for each in best) else ""
        rows.append(
            [
                swatch(number) + bdi(run.name) + badge,
                *([str(data_sets[number] or "")] if len(best) > 1 else []),
                _best_evaluation(run),
                *("" if value is None else formatted(value, form) for value, form in values),
                state_badge(run),
            ]
        )
    head = ["run", *(["rows"] if len(best) > 1 else []), "best validation", *(words for _, words, _ in heads), ""]
    note = f'<p class="note">{_note_on_best(runs, data_sets)} Other figures are the newest.</p>'
    result = table(head, rows, "The runs and their newest metrics", "by-run") + f"\n{note if best else ''}"
    names = dict.fromkeys(name for run in runs for name in run.config if name not in IGNORED_SETTINGS)
    different = [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]
    if different:
        heading = [swatch(number) + bdi(run.name) for number, run in enumerate(runs)]
        settings = [[text(name), *(setting_value(run.config.get(name)) for run in runs)] for name in different]
        result += "\n<h3>Settings that differ</h3>\n" + table(
            ["setting", *heading], settings, "Settings that differ", "by-run"
        )
    else:
        result += '\n<p class="note">All settings are the same.</p>'
    return section("The runs", "runs", result)


def with_short_names(runs: Sequence[Recorded]) -> list[Recorded]:
    """The runs, each named by its path below the directory that holds all of them; a single run by its own name."""
    directories = [run.directory.resolve() for run in runs]
    try:
        common = Path(os.path.commonpath([directory.parent for directory in directories]))
    except ValueError:  # on different drives
        return list(runs)
    return [replace(run, name=str(path.relative_to(common))) for run, path in zip(runs, directories, strict=True)]


def _note_on_best(runs: Sequence[Recorded], data_sets: Sequence[int | None]) -> str:
    """What the best run is, and that only figures of the same validation rows can be compared."""
    metrics: dict[int, set[str]] = {}
    for run, number in zip(runs, data_sets, strict=True):
        if number is not None:
            metrics.setdefault(number, set()).add(run.best_metric)
    metric = text(" or ".join(dict.fromkeys(map(common_metric, metrics.values()))).replace("_", " "))
    if len(metrics) < 2:
        return f"The best run has the best validation {metric}."
    return (
        "Only figures on the same validation rows can be compared; the column numbers them. Without a validation "
        f"split, --seed draws them. The best run on each has the best validation {metric}."
    )


def _best_evaluation(run: Recorded) -> str:
    """The best evaluation of a run: accuracy, macro F1 if it has one, and its step."""
    best = run.best_evaluation()
    if best is None:
        return ""
    macro_f1, step = best.get("eval_macro_f1"), best.get("step")
    return (
        formatted(best["eval_accuracy"], "{:.2%}")
        + (f", F1 {formatted(macro_f1, '{:.4f}')}" if is_number(macro_f1) else "")
        + (f' <span class="soft">step {formatted(step, "{:,}")}</span>' if is_number(step) else "")
    )


def setting_value(value: object) -> str:
    """The value of a setting; None is shown as not set."""
    return '<span class="soft">not set</span>' if value is None else bdi(value)


def state_badge(run: Recorded) -> str:
    """Whether the run is finished, or how far it is."""
    if run.finished:
        return '<span class="state done">finished</span>'
    step, epoch = run.last("step"), run.last("epoch")
    planned = run.config.get("max_steps"), run.config.get("epochs")
    of = f", epoch {formatted(epoch or 0, '{:.2f}')} of {text(planned[1])}"
    if is_number(planned[0]):
        of = f" of {formatted(planned[0], '{:,}')}"
    return f'<span class="state">not finished: step {formatted(step or 0, "{:,.0f}")}{of}</span>'
