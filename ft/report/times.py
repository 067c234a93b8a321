"""The part of a report that shows where the time of runs went."""

from collections.abc import Mapping, Sequence

from ft.report.charts import bar_chart
from ft.report.markup import bdi, swatch, table, text
from ft.report.run_record import Recorded, formatted

NO_TIMES = '<p class="note">{who} no timings.</p>'


def times_of_one(run: Recorded) -> str:
    """A bar and a table of the parts of one run."""
    seconds = _seconds(run)
    if not seconds:
        return NO_TIMES.format(who="This run has")
    total, steps = sum(seconds.values()), run.last("step") or 1
    rows = [
        [
            swatch(i) + text(part),
            formatted(value, "{:,.1f}") + " s",
            f"{value / total:.1%}",
            formatted(1000 * value / steps, "{:,.2f}") + " ms",
        ]
        for i, (part, value) in enumerate(seconds.items())
    ]
    content = table(["part", "total", "share", "per step"], rows, "Time by part")
    return f'<div class="card">\n<div class="bar">{_bar(seconds, seconds, 1)}</div>\n{content}\n</div>'


def times_of_several(runs: Sequence[Recorded]) -> str:
    """A table with a row for each run: its time, a bar of the shares, and the time per step of each part."""
    seconds = [_seconds(run) for run in runs]
    parts = list(dict.fromkeys(part for each in seconds for part in each))
    if not parts:
        return NO_TIMES.format(who="These runs have")
    rows = []
    for number, (run, own) in enumerate(zip(runs, seconds, strict=True)):
        total, steps = sum(own.values()), run.last("step") or 1
        cells = [_cell(own[part], steps, total) if part in own else "" for part in parts]
        bar = f'<div class="bar">{_bar(own, parts, number + 1)}</div>' if own else ""
        time = (
            [formatted(total, "{:,.1f}") + " s", formatted(1000 * total / steps, "{:,.2f}") + " ms"]
            if own
            else ["not recorded", ""]
        )
        rows.append([swatch(number) + bdi(run.name), *time, bar, *cells])
    head = ["run", "total", "per step", "shares", *(swatch(i) + text(part) for i, part in enumerate(parts))]
    return table(head, rows, "Time per step by run and part", "by-run")


def _cell(seconds: float, steps: float, total: float) -> str:
    return f'{formatted(1000 * seconds / steps, "{:,.2f}")} ms <span class="soft">{seconds / total:.0%}</span>'


def _seconds(run: Recorded) -> dict[str, float]:
    return {part: value for part, value in run.seconds_by_part().items() if value > 0}


def _bar(seconds: Mapping[str, float], parts: Sequence[str] | Mapping[str, float], number: int) -> str:
    """The shares of the parts as a bar; a part that this run has not is 0 wide, so that colors are the same in all."""
    total = sum(seconds.values())
    shares = ", ".join(f"{text(part)} {value / total:.0%}" for part, value in seconds.items())
    return bar_chart([seconds.get(part, 0.0) for part in parts], f"Time of run {number} by part: {shares}.")
