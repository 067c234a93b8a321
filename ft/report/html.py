"""The HTML report of one or more runs, in one file. Everything that comes from files is escaped by `text`."""

import html
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ft.errors import program
from ft.evaluation.classification import MOST_COLUMNS, most_confused
from ft.report.charts import COLORS, Curve, bar_chart, calibration_chart, line_chart, spans_magnitudes
from ft.report.run_record import Recorded, command_of, is_number, settings_given

LONGEST_TEXT = 1000  # characters of a mistake's text that are shown
MOST_ROWS = 500  # rows of the table of all metrics
CONFUSIONS = 20  # pairs of classes in the table of the most confused

# Characters that are invisible or change how their neighbors are displayed; they are shown as codes.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)

# The charts: a title, keys of metrics.jsonl with their names, the unit, and whether it is a share.
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], str, bool], ...] = (
    ("Loss", (("loss", "training"), ("eval_loss", "validation")), "nats per target", False),
    ("Accuracy", (("eval_accuracy", "validation"),), "share of correct predictions", True),
    ("Learning rate", (("learning_rate", ""),), "AdamW's step size", False),
    ("Gradient norm", (("grad_norm", ""),), "global, before clipping", False),
    ("Throughput", (("samples_per_second", ""),), "examples per second of training", False),
    ("Forgetting", (("general_perplexity", "general text"),), "perplexity on general text; higher is worse", False),
)
HEADLINES = (
    ("eval_accuracy", "validation accuracy", "{:.2%}"),
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("eval_loss", "validation loss", "{:.4f}"),
    ("loss", "training loss", "{:.4f}"),
    ("samples_per_second", "examples/s", "{:,.1f}"),
    ("step", "steps", "{:,.0f}"),
)


def text(value: object) -> str:
    """Escape a value for use anywhere in a page; invisible characters become codes."""
    return html.escape(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value)))


def page(runs: Sequence[Recorded]) -> str:
    """The HTML file for these runs."""
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].directory.resolve().name
    axis = "epoch" if len({_rows_per_step(run) for run in runs}) > 1 else "step"
    parts = [
        _header(runs, title),
        _compared(runs) if several else _headlines(runs[0]),
        _charts(runs, axis),
        _section("Where the time went", "time", "".join(_times(run, i, several) for i, run in enumerate(runs))),
        *(_evaluation(run, i, several) for i, run in enumerate(runs)),
        *(_settings(run, i, several) for i, run in enumerate(runs)),
        _section("All metrics", "metrics", "".join(_metrics(run, i, several) for i, run in enumerate(runs))),
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


def _section(title: str, key: str, content: str) -> str:
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{content}\n</section>' if content else ""


def _name(run: Recorded, number: int, several: bool) -> str:
    """A run's name with its color as a heading; empty if there is only one run."""
    return f"<h3>{_swatch(number)}{_bdi(run.directory)}</h3>\n" if several else ""


def _swatch(number: int) -> str:
    dashes = number // COLORS % 4
    return f'<i class="swatch dash-{dashes}" style="--own: var(--color-{number % COLORS})"></i>'


def _bdi(value: object) -> str:
    """A text from a file, isolated so that its writing direction does not affect its surroundings."""
    return f"<bdi>{text(value)}</bdi>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, kind: str = "") -> str:
    """A table of markup in a scrolling box; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{x}</td>" for x in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _card(title: str, unit: str, content: str, kind: str = "") -> str:
    head = f'<figcaption><b>{title}</b> <span class="soft">{unit}</span></figcaption>'
    return f'<figure class="card {kind}">\n{head}\n{content}\n</figure>'


def _state(run: Recorded) -> str:
    """Whether the run is finished, or how far it is."""
    if run.finished:
        return '<span class="state done">finished</span>'
    step, epoch = run.last("step"), run.last("epoch")
    planned = run.config.get("max_steps"), run.config.get("epochs")
    of = f" of {planned[0]:,} steps" if is_number(planned[0]) else f", epoch {epoch or 0:.2f} of {text(planned[1])}"
    return f'<span class="state">not finished: step {step or 0:,.0f}{of}</span>'


def _header(runs: Sequence[Recorded], title: str) -> str:
    models = dict.fromkeys(f"{_bdi(run.config.get('model', 'a model'))}" for run in runs)
    data = dict.fromkeys(f"{_bdi(run.config.get('dataset', 'unknown data'))}" for run in runs)
    state = _state(runs[0]) if len(runs) == 1 else ""
    return (
        f'<header>\n<p class="kicker">Fine-tuning report</p>\n<h1>{_bdi(title)} {state}</h1>\n'
        f'<p>{", ".join(models)} <span class="soft">on</span> {", ".join(data)}</p>\n</header>'
    )


def _headlines(run: Recorded) -> str:
    tiles = [
        f"<div><dt>{words}</dt><dd>{form.format(value)}</dd></div>"
        for key, words, form in HEADLINES
        if (value := run.last(key)) is not None
    ]
    return f'<dl class="tiles">\n{"".join(tiles)}\n</dl>' if tiles else '<p class="note">No metrics yet.</p>'


def _compared(runs: Sequence[Recorded]) -> str:
    """The legend, the newest metrics, and the settings in which the runs differ."""
    heads = [(key, words, form) for key, words, form in HEADLINES if any(run.last(key) is not None for run in runs)]
    rows = []
    for number, run in enumerate(runs):
        values = [(run.last(key), form) for key, _, form in heads]
        rows.append(
            [
                _swatch(number) + _bdi(run.directory),
                *("" if value is None else form.format(value) for value, form in values),
                _state(run),
            ]
        )
    result = _table(["run", *(words for _, words, _ in heads), ""], rows, "The runs and their newest metrics")
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("output_dir", "resume"))
    different = [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]
    if different:
        heading = [_swatch(number) + _bdi(run.directory.name or run.directory) for number, run in enumerate(runs)]
        settings = [[text(name), *(_value(run.config.get(name)) for run in runs)] for name in different]
        result += "\n<h3>Settings that differ</h3>\n" + _table(["setting", *heading], settings, "Settings that differ")
    else:
        result += '\n<p class="note">All settings are the same.</p>'
    return _section("The runs", "runs", result)


def _value(value: object) -> str:
    return '<span class="soft">not set</span>' if value is None else _bdi(value)


def _charts(runs: Sequence[Recorded], axis: str) -> str:
    """A card for each chart that has data."""
    cards = []
    for title, figures, unit, percent in CHARTS:
        curves: list[Curve] = []
        summaries, legend = [], []
        kinds = [(key, words) for key, words in figures if any(run.curve(key, axis)[0] for run in runs)]
        for position, (key, words) in enumerate(kinds):
            marked = key.startswith(("eval", "general"))
            if len(kinds) > 1:
                swatch = _swatch(position) if len(runs) == 1 else ""
                legend.append(f"<span>{swatch}{words}{' (dots)' if marked else ' (thin)'}</span>")
            for number, run in enumerate(runs):
                x, y = run.curve(key, axis)
                if x:
                    curves.append(Curve(x, y, position if len(runs) == 1 else number, marked))
                    form: Callable[[float], str] = "{:.2%}".format if percent else "{:.4g}".format
                    about = f"{words} " * bool(words) + (f"of run {number + 1} " if len(runs) > 1 else "")
                    summaries.append(f"{about}{form(y[0])} at {axis} {x[0]:,g}, {form(y[-1])} at {axis} {x[-1]:,g}")
        if curves:
            logarithmic = title == "Forgetting" and spans_magnitudes(curves)
            description = f"{title} by {axis}{' (logarithmic)' * logarithmic}: {'; '.join(summaries)}."
            svg = line_chart(curves, axis, description, percent=percent, logarithmic=logarithmic)
            unit += "; logarithmic" * logarithmic
            cards.append(_card(title, unit, f'<p class="legend">{"".join(legend)}</p>\n{svg}'))
    legend_of_runs = "".join(f"<span>{_swatch(number)}{_bdi(run.directory)}</span>" for number, run in enumerate(runs))
    above = f'<p class="legend">{legend_of_runs}</p>\n' if len(runs) > 1 else ""
    none = '<p class="note">No metrics yet.</p>'
    return _section("Curves", "curves", above + f'<div class="grid">\n{"".join(cards)}\n</div>' if cards else none)


def _times(run: Recorded, number: int, several: bool) -> str:
    seconds = {part: value for part, value in run.seconds_by_part().items() if value > 0}
    if not seconds:
        return _name(run, number, several) + '<p class="note">This run has no timings.</p>'
    total, steps = sum(seconds.values()), run.last("step") or 1
    parts = list(seconds.items())
    shares = ", ".join(f"{text(part)} {value / total:.0%}" for part, value in parts)
    rows = [
        [_swatch(i) + text(part), f"{value:,.1f} s", f"{value / total:.1%}", f"{1000 * value / steps:,.2f} ms"]
        for i, (part, value) in enumerate(parts)
    ]
    bar = bar_chart([value for _, value in parts], f"Time of run {number + 1} by part: {shares}.")
    head = ["part", "total", "share", "per step"]
    return (
        _name(run, number, several)
        + f'<div class="card">\n<div class="bar">{bar}</div>\n{_table(head, rows, "Time by part")}\n</div>'
    )


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
    matrix = _table([corner, *heads], rows, "Confusion matrix", "matrix many" if many else "matrix")
    if not many:
        return _card("Confusion matrix", "", matrix)
    pairs = [
        [labels[true], labels[predicted], f"{examples:,}", f"{examples / sum(confusion[true]):.0%}"]
        for true, predicted, examples in most_confused(confusion, CONFUSIONS)
    ]
    confused = _table(["true", "predicted", "examples", "share of class"], pairs, "Most confused", "pairs")
    return _card("Confusion matrix", "a column for each label's number", matrix, "wide") + _card(
        "Most confused", f"the {len(pairs)} most frequent mistakes", confused, "wide"
    )


def _evaluation(run: Recorded, number: int, several: bool) -> str:
    """Confusion matrix, scores of each class, calibration, and the most confident errors."""
    key, name = f"scores-{number}", f" · {_bdi(run.directory)}" if several else ""
    scores = run.scores
    if scores is None:
        why = "they are written at its end" if not run.finished else "it has no valid scores.json"
        if run.config.get("completion_column") is not None:
            command = shlex.join([*program().split(), "evaluate", str(run.directory)])
            why = f"it was trained on completions, which <code>{text(command)}</code> evaluates"
        return _section(f"Evaluation{name}", key, f'<p class="note">This run has no scores: {why}.</p>')
    labels, confusion = [_bdi(label) for label in scores["labels"]], scores["confusion"]
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
    classes = _table(["label", "precision", "recall", "F1", "examples"], per_class, "Scores of each label")
    overview = (
        f"<p>{text(scores['split'])} split after step {scores['step']:,}: accuracy <b>{scores['accuracy']:.2%}</b>, "
        f"macro F1 <b>{scores['macro_f1']:.4f}</b>, calibration error <b>{scores['calibration_error']:.2%}</b>.</p>"
    )
    cards = (
        f'<div class="grid">\n{_matrix(labels, confusion)}\n{_card("Each label", "", classes, "wide" * many)}\n'
        f"{_card('Calibration', 'accuracy by predicted probability', chart)}\n</div>"
    )
    mistakes = "\n".join(map(_mistake, scores["mistakes"]))
    errors = f'<h3>Most confident errors</h3>\n<ol class="mistakes">\n{mistakes}\n</ol>' if mistakes else ""
    return _section(f"Evaluation{name}", key, overview + cards + errors)


def _mistake(mistake: dict[str, object]) -> str:
    words, probability = str(mistake["text"]), mistake["probability"]
    rest = f' <span class="soft">… and {len(words) - LONGEST_TEXT:,} more characters</span>'
    return (
        f'<li><blockquote dir="auto">{text(words[:LONGEST_TEXT])}{rest * (len(words) > LONGEST_TEXT)}</blockquote>\n'
        f"<p>predicted <b>{_bdi(mistake['label'])}</b> at {probability:.1%}, true <b>{_bdi(mistake['true'])}</b> "
        f'<span class="soft">row {text(mistake["row"])}</span></p></li>'
    )


def _settings(run: Recorded, number: int, several: bool) -> str:
    """The command line that reproduces the run, and all its settings."""
    if not run.config:
        content = '<p class="note">This run has no valid config.json.</p>'
    else:
        changed = settings_given(run.config)
        rows = [
            [text(name), f"<b>{_value(value)}</b>" if name in changed else _value(value)]
            for name, value in run.config.items()
        ]
        content = (
            f'<p>To reproduce this run:</p>\n<pre tabindex="0"><code>{text(command_of(run.config))}</code></pre>\n'
            f"<details>\n<summary>All {len(rows)} settings, those that are not the defaults in bold</summary>\n"
            f"{_table(['setting', 'value'], rows, 'Settings')}\n</details>"
        )
    return _section("Settings" + (f" · {_bdi(run.directory)}" if several else ""), f"settings-{number}", content)


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
    table = _table([text(key) for key in keys], rows, "Events")
    name = f"{_swatch(number)}{_bdi(run.directory)}: " if several else ""
    return f"<details>\n<summary>{name}{shown} lines of metrics.jsonl</summary>\n{table}\n</details>"
