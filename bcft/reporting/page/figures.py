"""The kinds of panels that a page has: curves, dots, stacks, steps down, histograms and a matrix.

Each takes plain numbers and returns the panel; what the numbers mean is not known here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bcft.reporting.page.parts import Key, Panel
from bcft.reporting.page.svg import COLOR, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKED = 40
"""A line of more points has no mark at each of them."""
FEW = 5
"""Fewer columns leave space beside them, and are not as wide as the panel."""
_EDGE = 0.8
"""Width of the gap between the boxes of a stack."""


@dataclass(frozen=True)
class Series:
    """A named line: its values by round, and their intervals where it has some.

    mark: `line`, with a dot at each value; `ring` or `square`, thinner and with these; `dash`, a level.
    """

    label: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]
    intervals: Sequence[Sequence[float]] = ()
    mark: str = "line"


def percent_text(share: float) -> str:
    """Return a share as a tick of an axis."""
    return f"{100 * share:.0f} %"


def number_text(value: float) -> str:
    """Return a number as a tick of an axis, with as many digits as it needs."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def curves(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    form: Callable[[float], str] = number_text,
    limits: tuple[float, float] | None = None,
    ring: tuple[float, float, str] | None = None,
    height: int = 230,
    axis: str = "round",
) -> Panel:
    """Return a panel of lines over rounds or steps; a series with mark `dash` is one value, a level.

    limits: of the values, else they follow from these; ring: round and value to mark, and what it marks.
    """
    drawn = [one for one in series if one.ys]

    def draw(axes: "Axes") -> None:
        xs = [x for one in drawn for x in one.xs] or [0]
        lows = [y for one in drawn for y in (*one.ys, *(low for low, _ in one.intervals))]
        highs = [y for one in drawn for y in (*one.ys, *(high for _, high in one.intervals))]
        pad = max((max(xs) - min(xs)) / 40, 0.4)
        axes.set_xlim(min(xs) - pad, max(xs) + pad)
        ys = ticks(axes, *(limits or (min(lows), max(highs))), form=form, fixed=limits is not None)
        axes.hlines(ys, *axes.get_xlim(), color=COLOR["line"], linewidth=0.8, zorder=0)
        rounds(axes, min(xs), max(xs), axis)
        for one in drawn:
            color = COLOR[one.color]
            if one.mark == "dash":
                axes.hlines(one.ys, *axes.get_xlim(), color=color, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
                continue
            if one.intervals:
                low, high = zip(*one.intervals, strict=True)
                axes.fill_between(one.xs, low, high, color=color, alpha=0.14, linewidth=0, zorder=1)
                axes.vlines(one.xs, low, high, color=color, alpha=0.55, linewidth=1, zorder=2)
            few, main = len(one.xs) <= MARKED, one.mark == "line"
            axes.plot(
                one.xs, one.ys, color=color, linewidth=2 if few and main else 1.2, zorder=3 + main, markersize=4,
                marker=("s" if one.mark == "square" else "o") if few else "",
                markerfacecolor=COLOR["paper"] if one.mark == "ring" else color,
            )  # fmt: skip
        if ring:
            axes.plot(*ring[:2], marker="o", markersize=9, markerfacecolor="none", color=COLOR["ink"], zorder=5)

    keys = [Key(one.label, one.color, one.mark) for one in drawn]
    keys += [Key(ring[2], "ink", "ring")] if ring else []
    return Panel(title, panel(name, draw, height=height), keys)


@dataclass(frozen=True)
class Dot:
    """A value in a row of dots, with its interval where it has one. mark: `dot`, `ring` or `square`."""

    row: str
    label: str
    color: str
    value: float
    interval: Sequence[float] = ()
    mark: str = "dot"


def dots(
    name: str,
    title: str,
    values: Sequence[Dot],
    *,
    form: Callable[[float], str] = number_text,
    limits: tuple[float, float] | None = None,
) -> Panel:
    """Return a panel of values side by side, a row for each of their names, from the top down."""
    names = list(dict.fromkeys(value.row for value in values))
    labels = list(dict.fromkeys(value.label for value in values))

    def draw(axes: "Axes") -> None:
        everything = [v for value in values for v in (value.value, *value.interval)]
        low, high = limits or (min(everything), max(everything))
        pad = 0.03 * (high - low or 1)
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(len(names) - 0.5, -0.5)
        marks = _ticks(low, high, 5)
        axes.vlines(marks, -0.5, len(names) - 0.5, color=COLOR["line"], linewidth=0.8, zorder=0)
        for mark in marks:
            _under(axes, mark, form(mark))
        for number, row in enumerate(names):
            _beside(axes, number, row, ink=True)
        for value in values:
            apart = (labels.index(value.label) - (len(labels) - 1) / 2) * 0.5 / max(len(labels) - 1, 1)
            y, color = names.index(value.row) + apart, COLOR[value.color]
            if value.interval:
                axes.hlines(y, *value.interval, color=color, linewidth=2.4, alpha=0.5, zorder=2)
            hollow = {"markerfacecolor": COLOR["paper"]} if value.mark == "ring" else {}
            shape = "s" if value.mark == "square" else "o"
            axes.plot(value.value, y, marker=shape, markersize=5.5, color=color, zorder=3, **hollow)

    marks_of = {value.label: value.mark for value in values}
    keys = [Key(label, "ink", marks_of[label]) for label in labels]
    return Panel(title, panel(name, draw, height=max(120, 60 + 48 * len(names)), left=118), keys)


def stacks(
    name: str,
    title: str,
    xs: Sequence[int],
    parts: Mapping[str, tuple[str, Sequence[float]]],
    *,
    form: Callable[[float], str] = number_text,
    labels: Sequence[str] = (),
    axis: str = "round",
    line: tuple[float, str] | None = None,
) -> Panel:
    """Return a panel of stacked columns, one for each x.

    parts: label -> color and heights, from the bottom up; labels: of the columns, in place of their numbers; line: a
    place on the x axis to mark, and what it marks.
    """

    def draw(axes: "Axes") -> None:
        total = max((sum(heights) for heights in zip(*(h for _, h in parts.values()), strict=True)), default=1)
        beside = max(0.6, (FEW - len(xs)) / 2)
        axes.set_xlim(min(xs) - beside, max(xs) + beside)
        ys = ticks(axes, 0, total or 1, form=form)
        axes.hlines(ys, *axes.get_xlim(), color=COLOR["line"], linewidth=0.8, zorder=0)
        bottom = [0.0] * len(xs)
        for color, heights in parts.values():
            boxes = {"color": COLOR[color], "edgecolor": COLOR["paper"], "linewidth": _EDGE}
            axes.bar(xs, heights, 0.8, bottom, zorder=2, **boxes)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        if labels:
            for x, label in [*zip(xs, labels, strict=True)][:: -(-len(xs) // 7)]:
                _under(axes, x, label)
            _title_below(axes, axis)
        else:
            rounds(axes, min(xs), max(xs))
        if line:
            axes.vlines(line[0], *axes.get_ylim(), color=COLOR["ink"], linewidth=1.4, linestyle=(0, (4, 3)), zorder=4)

    keys = [Key(label, color, "box") for label, (color, _) in parts.items()]
    return Panel(title, panel(name, draw), [*keys, *([Key(line[1], "ink", "dash")] if line else [])])


def waterfall(name: str, title: str, steps: Sequence[tuple[str, str, float]], *, first: str, last: str) -> Panel:
    """Return a panel of what remains after each step down.

    steps: label, color, and how much is lost; first, last: what there is before them and after.
    """
    whole = sum(lost for *_, lost in steps)
    left = whole - sum(lost for *_, lost in steps[:-1])
    rows = [(first, "n5", 0.0, whole)]
    remaining = whole
    for label, color, lost in steps[:-1]:
        remaining -= lost
        rows.append((label, color, remaining, lost))
    rows.append((last, steps[-1][1], 0.0, left))

    def draw(axes: "Axes") -> None:
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.45 * (whole or 1))
        for number, (label, color, start, width) in enumerate(rows):
            axes.barh(number, width, 0.62, start, color=COLOR[color], zorder=2)
            sign = "\N{MINUS SIGN}" if 0 < number < len(rows) - 1 else ""
            share = f" ({100 * width / whole:.1f} %)" if number and whole else ""
            words = f"{sign}{width:,.0f}{share}"
            axes.annotate(
                words, (start + width, number), (7, 0), textcoords="offset points", va="center_baseline",
                color=COLOR["ink"], size=10,
            )  # fmt: skip
            _beside(axes, number, label, ink=True)
            if number < len(rows) - 1:
                edge = whole if number == 0 else start
                axes.vlines(edge, number - 0.31, number + 1.31, color=COLOR["soft"], linewidth=0.7, zorder=1)

    return Panel(title, panel(name, draw, height=46 + 26 * len(rows), left=112, right=4))


def matrix(
    name: str, title: str, counts: Sequence[Sequence[int]], labels: Sequence[str], *, across: str, up: str
) -> Panel:
    """Return a panel of counts by two properties: rows from the bottom up, columns from the left."""
    most = max((n for row in counts for n in row), default=0) or 1

    def draw(axes: "Axes") -> None:
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(-0.5, len(labels) - 0.5)
        for y, row in enumerate(counts):
            for x, n in enumerate(row):
                color = COLOR["accent" if y > x else "other" if y < x else "soft"]
                if n:
                    strength = 0.12 + 0.6 * n / most
                    axes.bar(x, 0.94, 0.94, y - 0.47, color=color, alpha=strength, linewidth=0, zorder=1)
                axes.text(
                    x, y, f"{n:,}", ha="center", va="center_baseline", color=COLOR["ink" if n else "n5"], size=10.5
                )
        for number, label in enumerate(labels):
            _under(axes, number, label)
            _beside(axes, number, label)
        _title_below(axes, across)
        axes.text(0, 1.02, up, transform=axes.transAxes, ha="right", va="bottom")

    keys = [
        Key("solved more often", "accent", "box"),
        Key("less often", "other", "box"),
        Key("as often", "soft", "box"),
    ]
    return Panel(title, panel(name, draw, height=230, left=66), keys)


# Axes


def ticks(
    axes: "Axes", low: float, high: float, *, form: Callable[[float], str], fixed: bool = False
) -> Sequence[float]:
    """Draw the ticks of the y axis, whose limits enclose the values; return their places."""
    if low == high:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    marks = _ticks(low, high, 4)
    if not fixed:
        low = min(low, marks[0])
    pad = (high - low) / 30
    axes.set_ylim(low - (pad if fixed else 0), high + pad)
    shown = [mark for mark in marks if low <= mark <= high + pad]
    for mark in shown:
        _beside(axes, mark, form(mark))
    return shown


def rounds(axes: "Axes", first: float, last: float, axis: str = "round") -> None:
    """Draw the ticks of the x axis at whole numbers, and its name."""
    every = 1
    while (last - first) / every > 8:
        every = every * 5 // 2 if str(every)[0] == "2" else every * 2  # 1, 2, 5, 10, 20, ...
    for number in range(int(first), int(last) + 1):
        if number % every == 0:
            _under(axes, number, f"{number:,}")
    _title_below(axes, axis)


def _ticks(low: float, high: float, bins: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - only drawing needs it

    return [float(mark) for mark in MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _under(axes: "Axes", x: float, text: str) -> None:
    place = axes.get_xaxis_transform()
    axes.annotate(text, (x, 0), (0, -5), xycoords=place, textcoords="offset points", ha="center", va="top")


def _beside(axes: "Axes", y: float, text: str, *, ink: bool = False) -> None:
    place, color = axes.get_yaxis_transform(), COLOR["ink" if ink else "soft"]
    axes.annotate(
        text, (0, y), (-6, 0), xycoords=place, textcoords="offset points", ha="right", va="center_baseline", color=color
    )


def _title_below(axes: "Axes", text: str) -> None:
    axes.annotate(text, (1, 0), (0, -20), xycoords="axes fraction", textcoords="offset points", ha="right", va="top")
