"""The kinds of panels that a page has: curves, dots, stacks, steps down, histograms and a matrix.

Each takes plain numbers and returns the panel; what the numbers mean is not known here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bcft.reporting.page.parts import Key, Panel
from bcft.reporting.page.svg import COLOR, Canvas, panel

MARKED = 40
"""A line of more points has no mark at each of them."""
DASHES = (0, (4, 3))
FEW = 5
"""Fewer columns leave space beside them, and are not as wide as the panel."""


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

    def draw(canvas: Canvas) -> None:
        xs = [x for one in drawn for x in one.xs] or [0]
        lows = [y for one in drawn for y in (*one.ys, *(low for low, _ in one.intervals))]
        highs = [y for one in drawn for y in (*one.ys, *(high for _, high in one.intervals))]
        pad = max((max(xs) - min(xs)) / 40, 0.4)
        left, right = canvas.x_limits = (min(xs) - pad, max(xs) + pad)
        up(canvas, *(limits or (min(lows), max(highs))), form=form, fixed=limits is not None)
        along(canvas, min(xs), max(xs), axis)
        for one in drawn:
            if one.mark == "dash":
                level = one.ys[0]
                canvas.segments([(left, level, right, level)], one.color, linewidth=1.2, linestyle=DASHES)
                continue
            if one.intervals:
                low, high = zip(*one.intervals, strict=True)
                if one.mark == "line":
                    canvas.area(one.xs, low, high, one.color)
                ends = [(x, a, x, b) for x, (a, b) in zip(one.xs, one.intervals, strict=True)]
                canvas.segments(ends, one.color, linewidth=1, alpha=0.55)
        for one in sorted(drawn, key=lambda one: one.mark == "line"):  # main lines above the others
            few, main = len(one.xs) <= MARKED, one.mark == "line"
            shape = ("s" if one.mark == "square" else "o") if few else ""
            width = 2 if few and main else 1.2
            if one.mark != "dash":
                canvas.line(one.xs, one.ys, one.color, width=width, mark=shape, hollow=one.mark == "ring")
        if ring:
            canvas.line([ring[0]], [ring[1]], "ink", width=1.2, mark="o", hollow=True, size=9)
            canvas.line([ring[0]], [ring[1]], drawn[0].color, width=1, mark="o", size=4)

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

    def draw(canvas: Canvas) -> None:
        everything = [v for value in values for v in (value.value, *value.interval)]
        low, high = limits or (min(everything), max(everything))
        pad = 0.03 * (high - low or 1)
        canvas.x_limits, canvas.y_limits = (low - pad, high + pad), (len(names) - 0.5, -0.5)
        places = [place for place in _ticks(low, high, 5) if low - pad <= place <= high + pad]
        canvas.segments([(x, -0.5, x, len(names) - 0.5) for x in places], "line", linewidth=0.8)
        for place in places:
            canvas.under(place, form(place))
        for number, row in enumerate(names):
            canvas.beside(number, row, ink=True)
        for value in values:
            apart = (labels.index(value.label) - (len(labels) - 1) / 2) * 0.5 / max(len(labels) - 1, 1)
            y = names.index(value.row) + apart
            if value.interval:
                low, high = value.interval
                canvas.segments([(low, y, high, y)], value.color, linewidth=2.4, alpha=0.5)
            shape = "s" if value.mark == "square" else "o"
            canvas.line([value.value], [y], value.color, width=1.2, mark=shape, hollow=value.mark == "ring", size=5.5)

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

    def draw(canvas: Canvas) -> None:
        total = max((sum(heights) for heights in zip(*(h for _, h in parts.values()), strict=True)), default=1)
        space = max(0.6, (FEW - len(xs)) / 2)
        canvas.x_limits = (min(xs) - space, max(xs) + space)
        up(canvas, 0, total or 1, form=form)
        bottom = [0.0] * len(xs)
        for color, heights in parts.values():
            ends = zip(xs, bottom, heights, strict=True)
            corners = [(x - 0.4, low, x + 0.4, low + height) for x, low, height in ends if height]
            canvas.boxes(corners, color, edgecolor=COLOR["paper"], linewidth=0.8)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        if labels:
            for x, label in [*zip(xs, labels, strict=True)][:: -(-len(xs) // 7)]:
                canvas.under(x, label)
            canvas.name_x(axis)
        else:
            along(canvas, min(xs), max(xs), axis)
        if line:
            low, high = canvas.y_limits
            canvas.segments([(line[0], low, line[0], high)], "ink", linewidth=1.4, linestyle=DASHES)

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

    def draw(canvas: Canvas) -> None:
        canvas.x_limits, canvas.y_limits = (0, 1.45 * (whole or 1)), (len(rows) - 0.4, -0.6)
        for number, (label, color, start, width) in enumerate(rows):
            if number < len(rows) - 1:
                edge = whole if number == 0 else start
                canvas.segments([(edge, number - 0.31, edge, number + 1.31)], "soft", linewidth=0.7)
            canvas.boxes([(start, number - 0.31, start + width, number + 0.31)], color)
            sign = "\N{MINUS SIGN}" if 0 < number < len(rows) - 1 else ""
            share = f" ({100 * width / whole:.1f} %)" if number and whole else ""
            place = canvas.x(start + width) + 7, canvas.y(number) - 3.6
            canvas.words(f"{sign}{width:,.0f}{share}", *place, anchor="start", ink=True)
            canvas.beside(number, label, ink=True)

    return Panel(title, panel(name, draw, height=46 + 26 * len(rows), left=112, right=4))


def matrix(
    name: str, title: str, counts: Sequence[Sequence[int]], labels: Sequence[str], *, across: str, upward: str
) -> Panel:
    """Return a panel of counts by two properties: rows from the bottom up, columns from the left."""
    most = max((n for row in counts for n in row), default=0) or 1

    def draw(canvas: Canvas) -> None:
        canvas.x_limits = canvas.y_limits = (-0.5, len(labels) - 0.5)
        for y, row in enumerate(counts):
            for x, n in enumerate(row):
                color = "accent" if y > x else "other" if y < x else "soft"
                if n:
                    corners = (x - 0.47, y - 0.46, x + 0.47, y + 0.46)
                    canvas.boxes([corners], color, alpha=round(0.12 + 0.55 * n / most, 2))
                place = canvas.x(x), canvas.y(y) - 3.6
                canvas.words(f"{n:,}", *place, anchor="middle", ink=bool(n))
        for number, label in enumerate(labels):
            canvas.under(number, label)
            canvas.beside(number, label)
        canvas.name_x(across)
        canvas.name_y(upward)

    keys = [
        Key("solved more often", "accent", "box"),
        Key("less often", "other", "box"),
        Key("as often", "soft", "box"),
    ]
    return Panel(title, panel(name, draw, height=230, left=66), keys)


# Scales


def up(canvas: Canvas, low: float, high: float, *, form: Callable[[float], str], fixed: bool = False) -> None:
    """Set the limits of y, which enclose the values, and draw lines at round ones."""
    if low == high:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    places = _ticks(low, high, 4)
    pad = (high - low) / 30
    low = low if fixed else min(low, places[0])
    canvas.y_limits = (low - (pad if fixed else 0), high + pad)
    places = [place for place in places if low <= place <= high + pad]
    left, right = canvas.x_limits
    canvas.segments([(left, place, right, place) for place in places], "line", linewidth=0.8)
    for place in places:
        canvas.beside(place, form(place))


def along(canvas: Canvas, first: float, last: float, axis: str) -> None:
    """Write whole numbers below x, and what they are."""
    every = 1
    while (last - first) / every > 8:
        every = every * 5 // 2 if str(every)[0] == "2" else every * 2  # 1, 2, 5, 10, 20, ...
    for number in range(-(-int(first) // every) * every, int(last) + 1, every):
        canvas.under(number, f"{number:,}")
    canvas.name_x(axis)


def _ticks(low: float, high: float, most: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - only drawing needs it

    return [float(place) for place in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
