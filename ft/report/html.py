"""The HTML report of one or more runs, in one file. Everything that comes from files is escaped by `text`."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ft.errors import program
from ft.evaluation.classification import MOST_COLUMNS, most_confused
from ft.report.charts import Curve, calibration_chart, line_chart, spans_magnitudes
from ft.report.comparison import HEADLINES, compared, setting_value, state_badge, with_short_names
from ft.report.markup import bdi, card, section, swatch, table, text
from ft.report.run_record import Recorded, command_of, formatted, is_number, predicted_label, settings_given
from ft.report.times import times_of_one, times_of_several

LONGEST_TEXT = 1000  # characters of a mistake's text that are shown
MOST_ROWS = 500  # rows of the table of all metrics
CONFUSIONS = 20  # pairs of classes in the table of the most confused

# The charts: a title, keys of metrics.jsonl with their names, the unit, and whether it is a share.
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], str, bool], ...] = (
    ("Loss", (("loss", "training"), ("eval_loss", "validation")), "nats per target", False),
    (
        "Accuracy",
        (("eval_accuracy", "validation"), ("eval_majority_baseline", "majority baseline")),
        "share of correct predictions",
        True,
    ),
    ("Macro F1", (("eval_macro_f1", ""),), "validation, mean over the labels", False),
    ("Learning rate", (("learning_rate", ""),), "AdamW's step size", False),
    ("Gradient norm", (("grad_norm", ""),), "global, before clipping", False),
    ("Throughput", (("samples_per_second", ""),), "examples per second of training", False),
    ("Forgetting", (("general_perplexity", "general text"),), "perplexity on general text; higher is worse", False),
)
SHARES = ("Accuracy", "Macro F1")  # the charts of values from 0 to 1


def page(runs: Sequence[Recorded]) -> str:
    """The HTML file for these runs."""
    several = len(runs) > 1
    runs = with_short_names(runs)
    title = f"{len(runs)} runs" if several else runs[0].directory.resolve().name
    axis = "epoch" if len({_rows_per_step(run) for run in runs}) > 1 else "step"
    parts = [
        _header(runs, title),
        compared(runs) if several else _headlines(runs[0]),
        _charts(runs, axis),
        section("Where the time went", "time", times_of_several(runs) if several else times_of_one(runs[0])),
        *(_evaluation(run, i, several) for i, run in enumerate(runs)),
        *(_settings(run, i, several) for i, run in enumerate(runs)),
        section("All metrics", "metrics", "".join(_metrics(run, i, several) for i, run in enumerate(runs))),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)} · fine-tuning report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _rows_per_step(run: Recorded) -> object:
    return tuple(run.config.get(name) for name in ("batch_size", "gradient_accumulation_steps", "processes"))


def _header(runs: Sequence[Recorded], title: str) -> str:
    models = dict.fromkeys(f"{bdi(run.config.get('model', 'a model'))}" for run in runs)
    data = dict.fromkeys(f"{bdi(run.config.get('dataset', 'unknown data'))}" for run in runs)
    state = state_badge(runs[0]) if len(runs) == 1 else ""
    return (
        f'<header>\n<p class="kicker">Fine-tuning report</p>\n<h1>{bdi(title)} {state}</h1>\n'
        f'<p>{", ".join(models)} <span class="soft">on</span> {", ".join(data)}</p>\n</header>'
    )


def _headlines(run: Recorded) -> str:
    tiles = [
        f"<div><dt>{words}</dt><dd>{formatted(value, form)}</dd></div>"
        for key, words, form in HEADLINES
        if (value := run.last(key)) is not None
    ]
    return f'<dl class="tiles">\n{"".join(tiles)}\n</dl>' if tiles else '<p class="note">No metrics yet.</p>'


def _charts(runs: Sequence[Recorded], axis: str) -> str:
    """A card for each chart that has data."""
    cards = []
    for title, figures, unit, percent in CHARTS:
        curves: list[Curve] = []
        summaries, legend = [], []
        kinds = [(key, words) for key, words in figures if any(run.curve(key, axis)[0] for run in runs)]
        for position, (key, words) in enumerate(kinds):
            marked = key.startswith(("eval", "general")) and key != "eval_majority_baseline"
            if len(kinds) > 1:
                own_swatch = swatch(position) if len(runs) == 1 else ""
                legend.append(f"<span>{own_swatch}{words}{' (dots)' if marked else ' (thin)'}</span>")
            for number, run in enumerate(runs):
                x, y = run.curve(key, axis)
                if x:
                    curves.append(Curve(x, y, position if len(runs) == 1 else number, marked))
                    form = partial(formatted, form="{:.2%}" if percent else "{:.4g}")
                    about = f"{words} " * bool(words) + (f"of run {number + 1} " if len(runs) > 1 else "")
                    summaries.append(f"{about}{form(y[0])} at {axis} {x[0]:,g}, {form(y[-1])} at {axis} {x[-1]:,g}")
        if curves:
            logarithmic = title == "Forgetting" and spans_magnitudes(curves)
            is_share = title in SHARES and all(0 <= y <= 1 for curve in curves for y in curve.y)
            description = f"{title} by {axis}{' (logarithmic)' * logarithmic}: {'; '.join(summaries)}."
            svg = line_chart(
                curves,
                axis,
                description,
                percent=percent and is_share,
                logarithmic=logarithmic,
                from_zero=title == "Throughput",
                is_share=is_share,
            )
            unit += "; logarithmic" * logarithmic
            cards.append(card(title, unit, f'<p class="legend">{"".join(legend)}</p>\n{svg}'))
    legend_of_runs = "".join(f"<span>{swatch(number)}{bdi(run.name)}</span>" for number, run in enumerate(runs))
    above = f'<p class="legend">{legend_of_runs}</p>\n' if len(runs) > 1 else ""
    none = '<p class="note">No metrics yet.</p>'
    return section("Curves", "curves", above + f'<div class="grid">\n{"".join(cards)}\n</div>' if cards else none)


def _matrix(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """The confusion matrix as a card; of many classes with small cells, and the most confused pairs in a second card.

    Args:
        labels: their names, as markup.
        confusion: a row of counts for each true class.
    """
    many = len(labels) > MOST_COLUMNS
    rows = []
    for number, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        total = sum(counts) or 1
        cells = []
        for predicted, count in enumerate(counts):
            kind = "right" if predicted == number else "wrong"
            cell = f'<span class="cell {kind}" style="--share: {count / total:.3f}">{count:,}</span>'
            cells.append("" if many and count == 0 else cell)  # most of thousands of cells are 0
        rows.append([label, *cells])
    heads = list(map(str, range(len(labels)))) if many else labels
    corner = 'true <span class="soft">\\</span> predicted'
    matrix = table([corner, *heads], rows, "Confusion matrix", "matrix many" if many else "matrix")
    if not many:
        return card("Confusion matrix", "", matrix)
    pairs = [
        [labels[true], labels[predicted], f"{examples:,}", f"{examples / sum(confusion[true]):.0%}"]
        for true, predicted, examples in most_confused(confusion, CONFUSIONS)
    ]
    confused = table(["true", "predicted", "examples", "share of class"], pairs, "Most confused", "pairs")
    return card("Confusion matrix", "a column for each label's number", matrix, "wide") + card(
        "Most confused", f"the {len(pairs)} most frequent mistakes", confused, "wide"
    )


def _evaluation(run: Recorded, number: int, several: bool) -> str:
    """Confusion matrix, scores of each class, calibration, and the most confident errors."""
    key, name = f"scores-{number}", f" · {bdi(run.name)}" if several else ""
    scores = run.scores
    if scores is None:
        why = "they are written at its end" if not run.finished else "it has no valid scores.json"
        if run.config.get("completion_column") is not None:
            command = shlex.join([*program().split(), "evaluate", str(run.directory)])
            why = f"it was trained on completions, which <code>{text(command)}</code> evaluates"
        return section(f"Evaluation{name}", key, f'<p class="note">This run has no scores: {why}.</p>')
    labels, confusion = [bdi(label) for label in scores["labels"]], scores["confusion"]
    many = len(labels) > MOST_COLUMNS
    if many:  # names do not fit above the columns of the matrix
        labels = [f'<span class="number">{i}</span> {label}' for i, label in enumerate(labels)]
    per_class = [
        [label, f"{p:.2%}", f"{r:.2%}", f"{f1:.4f}", f"{sum(counts):,}"]
        for label, p, r, f1, counts in zip(
            labels, scores["precision"], scores["recall"], scores["f1"], confusion, strict=True
        )
    ]
    pairs = "; ".join(f"probability {mean:.0%}, accuracy {accuracy:.0%}" for mean, accuracy, _ in scores["bins"])
    chart = calibration_chart(scores["bins"], f"Calibration of run {number + 1}: {pairs}.")
    classes = table(["label", "precision", "recall", "F1", "examples"], per_class, "Scores of each label")
    overview = (
        f"<p>{text(scores['split'])} split after step {scores['step']:,}: accuracy <b>{scores['accuracy']:.2%}</b>"
        f"{_baseline(scores)}, macro F1 <b>{scores['macro_f1']:.4f}</b>, calibration error "
        f"<b>{scores['calibration_error']:.2%}</b>.</p>"
    )
    cards = (
        f'<div class="grid">\n{_matrix(labels, confusion)}\n{card("Each label", "", classes, "wide" * many)}\n'
        f"{card('Calibration', 'accuracy by predicted probability', chart)}\n</div>"
    )
    mistakes = "\n".join(map(_mistake, scores["mistakes"]))
    errors = f'<h3>Most confident errors</h3>\n<ol class="mistakes">\n{mistakes}\n</ol>' if mistakes else ""
    return section(f"Evaluation{name}", key, overview + cards + errors)


def _baseline(scores: dict[str, Any]) -> str:
    """The majority baseline behind an accuracy, with a note if the accuracy does not beat it; empty if not recorded."""
    if "majority_baseline" not in scores:
        return ""
    note = "" if scores["accuracy"] > scores["majority_baseline"] else ", <b>which it does not beat</b>"
    label = bdi(scores.get("majority_label"))
    return f" (majority baseline <b>{scores['majority_baseline']:.2%}</b>, always {label}{note})"


def _mistake(mistake: dict[str, object]) -> str:
    words, probability = str(mistake["text"]), mistake["probability"]
    place = f"row {mistake['row']}" if mistake.get("line") is None else f"line {mistake['line']}"
    predicted, true = bdi(predicted_label(mistake)), bdi(mistake["true"])
    rest = f' <span class="soft">… and {len(words) - LONGEST_TEXT:,} more characters</span>'
    return (
        f'<li><blockquote dir="auto">{text(words[:LONGEST_TEXT])}{rest * (len(words) > LONGEST_TEXT)}</blockquote>\n'
        f"<p>predicted <b>{predicted}</b> at {probability:.1%}, true <b>{true}</b> "
        f'<span class="soft">{text(place)}</span></p></li>'
    )


def _settings(run: Recorded, number: int, several: bool) -> str:
    """The command line that reproduces the run, and all its settings."""
    if not run.config:
        content = '<p class="note">This run has no valid config.json.</p>'
    else:
        changed = settings_given(run.config)
        rows = [
            [text(name), f"<b>{setting_value(value)}</b>" if name in changed else setting_value(value)]
            for name, value in run.config.items()
        ]
        content = (
            f'<p>To reproduce this run:</p>\n<pre tabindex="0"><code>{text(command_of(run.config))}</code></pre>\n'
            f"<details>\n<summary>All {len(rows)} settings, those that are not the defaults in bold</summary>\n"
            f"{table(['setting', 'value'], rows, 'Settings')}\n</details>"
        )
    return section("Settings" + (f" · {bdi(run.name)}" if several else ""), f"settings-{number}", content)


def _metrics(run: Recorded, number: int, several: bool) -> str:
    """All events of a run as a table."""
    keys = [
        key
        for key in dict.fromkeys(key for event in run.events for key in event)
        if any(is_number(event.get(key)) for event in run.events)
    ]
    rows = [
        [f"{event[key]:.6g}" if is_number(event.get(key)) else "" for key in keys] for event in run.events[-MOST_ROWS:]
    ]
    if not rows:
        return ""
    shown = f"the last {MOST_ROWS:,} of {len(run.events):,}" if len(run.events) > MOST_ROWS else f"all {len(rows):,}"
    events = table([text(key) for key in keys], rows, "Events")
    name = f"{swatch(number)}{bdi(run.name)}: " if several else ""
    return f"<details>\n<summary>{name}{shown} lines of metrics.jsonl</summary>\n{events}\n</details>"
