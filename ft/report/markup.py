"""The HTML that the parts of a report share. Everything that comes from files is escaped by `text`."""

import html
import re
from collections.abc import Sequence

from ft.report.charts import COLORS

# Characters that are invisible or change how their neighbors are displayed; they are shown as codes.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)


def text(value: object) -> str:
    """Escape a value for use anywhere in a page; invisible characters become codes."""
    return html.escape(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value)))


def section(title: str, key: str, content: str) -> str:
    """A section under a heading with the id `key`; empty if there is no content."""
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{content}\n</section>' if content else ""


def swatch(number: int) -> str:
    """The line style of run or part `number` in charts, as a sample for a legend."""
    dashes = number // COLORS % 4
    return f'<i class="swatch dash-{dashes}" style="--own: var(--color-{number % COLORS})"></i>'


def bdi(value: object) -> str:
    """A text from a file, isolated so that its writing direction does not affect its surroundings."""
    return f"<bdi>{text(value)}</bdi>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, kind: str = "") -> str:
    """A table of markup in a scrolling box; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{x}</td>" for x in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def card(title: str, unit: str, content: str, kind: str = "") -> str:
    """A framed figure with its title and unit above it."""
    head = f'<figcaption><b>{title}</b> <span class="soft">{unit}</span></figcaption>'
    return f'<figure class="card {kind}">\n{head}\n{content}\n</figure>'
