"""The part of a report that compares several runs: their newest metrics, and the settings in which they differ."""

from collections.abc import Sequence

from ft.report.markup import bdi, section, swatch, table, text
from ft.report.run_record import Recorded, is_number

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
    """The legend, the newest metrics, and the settings in which the runs differ."""
    heads = [(key, words, form) for key, words, form in HEADLINES if any(run.last(key) is not None for run in runs)]
    rows = []
    for number, run in enumerate(runs):
        values = [(run.last(key), form) for key, _, form in heads]
        rows.append(
            [
                swatch(number) + bdi(run.directory),
                *("" if value is None else form.format(value) for value, form in values),
                state_badge(run),
            ]
        )
    result = table(["run", *(words for _, words, _ in heads), ""], rows, "The runs and their newest metrics")
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("output_dir", "resume"))
    different = [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]
    if different:
        heading = [swatch(number) + bdi(run.directory.name or run.directory) for number, run in enumerate(runs)]
        settings = [[text(name), *(setting_value(run.config.get(name)) for run in runs)] for name in different]
        result += "\n<h3>Settings that differ</h3>\n" + table(["setting", *heading], settings, "Settings that differ")
    else:
        result += '\n<p class="note">All settings are the same.</p>'
    return section("The runs", "runs", result)


def setting_value(value: object) -> str:
    """The value of a setting; None is shown as not set."""
    return '<span class="soft">not set</span>' if value is None else bdi(value)


def state_badge(run: Recorded) -> str:
    """Whether the run is finished, or how far it is."""
    if run.finished:
        return '<span class="state done">finished</span>'
    step, epoch = run.last("step"), run.last("epoch")
    planned = run.config.get("max_steps"), run.config.get("epochs")
    of = f" of {planned[0]:,} steps" if is_number(planned[0]) else f", epoch {epoch or 0:.2f} of {text(planned[1])}"
    return f'<span class="state">not finished: step {step or 0:,.0f}{of}</span>'


def run_heading(run: Recorded, number: int, several: bool) -> str:
    """A run's name with its color as a heading; empty if there is only one run."""
    return f"<h3>{swatch(number)}{bdi(run.directory)}</h3>\n" if several else ""
