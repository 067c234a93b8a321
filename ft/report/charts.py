"""Charts by matplotlib, as SVG that takes its colors and font from the page around it.

A chart contains no text from files: that is in the page, where it is escaped.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLORS = 8  # the page has this many for runs and for parts; more runs reuse them with other dashes
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

# Placeholders that matplotlib writes, and that `_for_page` replaces with the CSS variables of the page.
TEXT, GRID = "#010101", "#020202"
_STAND_INS = {TEXT: "var(--soft)", GRID: "var(--line)"}
_STAND_INS |= {f"#0100{i:02x}": f"var(--color-{i})" for i in range(COLORS)}

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # text stays text
    "path.simplify_threshold": 0.5,
    "font.size": 11,  # at least as wide as the font of the page
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart: `number` selects color and dashes; `marked` has a dot at each point, others are thin."""

    x: Sequence[float]
    y: Sequence[float]
    number: int
    marked: bool = False


def color(number: int) -> str:
    """The placeholder for the page's color of a run or part."""
    return f"#0100{number % COLORS:02x}"


def spans_magnitudes(curves: Sequence[Curve]) -> bool:
    """Whether the values span a factor of 100 or more, for which an axis must be logarithmic."""
    values = [value for curve in curves for value in curve.y]
    return min(values) > 0 and max(values) >= 100 * min(values)


def line_chart(
    curves: Sequence[Curve],
    axis: str,
    description: str,
    *,
    percent: bool = False,
    logarithmic: bool = False,
    from_zero: bool = False,
    is_share: bool = False,
) -> str:
    """Curves over steps or epochs as an SVG element, with `description` as its aria-label.

    Args:
        curves: the lines.
        axis: what x is.
        description: of the chart, in words.
        percent: label the y axis in percent.
        logarithmic: use a logarithmic y axis.
        from_zero: begin the y axis at 0.
        is_share: the values are between 0 and 1, beyond which the y axis does not go.
    """
    with _style(description):
        figure, axes = _figure(2.3)
        for curve in curves:
            dashes = DASHES[curve.number // COLORS % len(DASHES)]
            axes.plot(
                curve.x,
                curve.y,
                color=color(curve.number),
                linestyle=dashes,
                linewidth=1.7 if curve.marked else 1.2,
                marker="o" if curve.marked or len(curve.x) == 1 else None,  # a single point makes no line
                markersize=3.2,
                clip_on=not is_share,  # a dot at the end of the axis is not cut in half
            )
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "step"))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        steps = (1, 2, 5, 10) if is_share else None  # round ones, of which one is at 1
        axes.yaxis.set_major_locator(LogLocator(numticks=6) if logarithmic else MaxNLocator(5, steps=steps))
        if from_zero:
            axes.set_ylim(bottom=0)
        if is_share:
            low, high = axes.get_ylim()  # with a margin
            axes.set_ylim(max(low, 0), min(high, 1))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None) if percent else FuncFormatter(_tick))
        return _svg(figure, description)


def bar_chart(parts: Sequence[float], description: str) -> str:
    """One stacked horizontal bar, in the colors 0, 1, ... of the page."""
    with _style(description):
        figure, axes = _figure(0.32)
        start = 0.0
        for number, part in enumerate(parts):
            axes.barh(0, part, left=start, color=color(number), height=1)
            start += part
        axes.set_xlim(0, start)
        axes.set_axis_off()
        figure.set_layout_engine("none")
        axes.set_position((0, 0, 1, 1))
        return _svg(figure, description, preserveAspectRatio="none")  # the page sets the height


def calibration_chart(bins: Sequence[Sequence[float]], description: str) -> str:
    """Accuracy over predicted probability, with the diagonal of perfect calibration."""
    with _style(description):
        figure, axes = _figure(2.3)
        axes.plot((0, 1), (0, 1), color=TEXT, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot([row[0] for row in bins], [row[1] for row in bins], color=color(0), marker="o", markersize=4)
        axes.set_xlabel("predicted probability")
        axes.set_ylim(-0.03, 1.03)
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_formatter(PercentFormatter(1))
        return _svg(figure, description)


def _style(description: str) -> AbstractContextManager[None]:
    """Matplotlib's settings for a chart; the salt makes its ids reproducible, and different from those of others."""
    settings: Any = {**_STYLE, "svg.hashsalt": description}
    return matplotlib.rc_context(settings)


def _figure(height: float) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.add_subplot()


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"


def _tick(value: float, _: int) -> str:
    """A tick label of at most about five characters."""
    if abs(value) >= 1e4:
        return _short(value)
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _svg(figure: Figure, description: str, **attributes: str) -> str:
    """The figure as an SVG element without prolog, date, sizes and group names."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description, **attributes}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style") or (child.tag == f"{SVG}defs" and not len(child)):
                parent.remove(child)
    return _for_page(root)


def _for_page(root: ElementTree.Element) -> str:
    """Markup with the page's colors, and without unused ids, which several charts would share."""
    for element in root.iter():
        target = element.attrib.pop(f"{XLINK}href", None)
        if target is not None:
            element.set("href", target)
        if element.tag in (f"{SVG}g", f"{SVG}text"):
            element.attrib.pop("id", None)
        element.tag = element.tag.removeprefix(SVG)
    root.set("xmlns", SVG.strip("{}"))
    markup = ElementTree.tostring(root, encoding="unicode")
    return re.sub("|".join(_STAND_INS), lambda found: _STAND_INS[found[0]], markup)
