"""Drawings by matplotlib as inline SVG: colors are those of the page's style sheet, so that they follow its theme.

Every color of a drawing has a placeholder, which becomes a variable of the style sheet. The same numbers give the same
bytes, whatever the user's own matplotlibrc says. matplotlib's axes would take most of the time of a drawing, so that a
`Canvas` places lines, boxes and words itself.
"""

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (
    "ink", "soft", "line", "paper", "accent", "accent-2", "accent-3", "accent-4", "other", "other-2", "other-3",
    "n1", "n2", "n3", "n4", "n5",
)  # fmt: skip
"""The colors of the style sheet that drawings use."""
COLOR = {name: f"#c0ffe{number:x}" for number, name in enumerate(NAMES)}
"""Color of the style sheet -> its placeholder in a drawing."""
WIDTH = 380
"""Of a panel, in the units of its text sizes: a phone shows it at this size, and a wide page two of them in a row."""
_VARIABLE = {placeholder: f"var(--{name})" for name, placeholder in COLOR.items()}
_PLACEHOLDER = re.compile("#c0ffe[0-9a-f]")
_DROPPED = re.compile(
    r"<metadata>.*?</metadata>\s*|<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*|<!--.*?-->\s*", re.DOTALL
)
_NUMBER = re.compile(r"(\d+\.\d\d)\d+")
_TAG = re.compile("<[^>]*>")
_GROUP_ID = re.compile(r'(<g) id="[^"]*"')
_REFERENCE = re.compile(r'(id="|url\(#|xlink:href="#)')


@contextmanager
def drawing() -> Iterator[None]:
    """Draw inside it: matplotlib's defaults with the page's colors, and afterwards what was there before."""
    import matplotlib  # noqa: PLC0415 - only drawing needs it

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "bcft",
                "lines.solid_capstyle": "round",
            }
        )
        yield


class Canvas:
    """A drawing with linear scales for x and y, whose limits are set before anything is placed.

    left, right: margins in units of text sizes, of which the canvas is `WIDTH` wide.
    """

    TOP, BOTTOM = 12, 34

    def __init__(self, figure: "Figure", height: int, left: int, right: int) -> None:
        self.figure = figure
        self._left, self._width = left, WIDTH - left - right
        self._height = height - self.TOP - self.BOTTOM
        self._top = height
        self.texts: list[str] = []
        """Markup, written after the drawing: matplotlib would measure each of them in a font that is not the page's."""
        self.x_limits = self.y_limits = (0.0, 1.0)

    def x(self, value: float) -> float:
        """Return where a value of x is."""
        low, high = self.x_limits
        return self._left + self._width * (float(value) - low) / (high - low)

    def y(self, value: float) -> float:
        """Return where a value of y is, from below."""
        low, high = self.y_limits
        return self.BOTTOM + self._height * (float(value) - low) / (high - low)

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        color: str,
        *,
        width: float,
        mark: str = "",
        hollow: bool = False,
        size: float = 4,
    ) -> None:
        """Draw a line through points, with a mark at each of them: `o`, `s` or none."""
        from matplotlib.lines import Line2D  # noqa: PLC0415 - only drawing needs it

        face = COLOR["paper"] if hollow else COLOR[color]
        places = [*map(self.x, xs)], [*map(self.y, ys)]
        self._add(
            Line2D(*places, color=COLOR[color], linewidth=width, marker=mark, markersize=size, markerfacecolor=face)
        )

    def segments(self, ends: Sequence[tuple[float, float, float, float]], color: str, **style: Any) -> None:
        """Draw straight lines, each from x, y to x, y. style: of the lines, as matplotlib has it."""
        points = [(x, y) for x0, y0, x1, y1 in ends for x, y in ((x0, y0), (x1, y1))]
        self._path(points, 2, facecolor="none", edgecolor=COLOR[color], **style)

    def boxes(self, corners: Sequence[tuple[float, float, float, float]], color: str, **style: Any) -> None:
        """Draw boxes, each from x, y to x, y."""
        points = [(x, y) for x0, y0, x1, y1 in corners for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))]
        self._path(points, 5, facecolor=COLOR[color], **{"edgecolor": "none", **style})

    def area(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], color: str) -> None:
        """Fill what is between two lines."""
        points = [*zip(xs, lows, strict=True), *reversed([*zip(xs, highs, strict=True)])]
        self._path(points, len(points), facecolor=COLOR[color], edgecolor="none", alpha=0.14)

    def words(self, text: str, x: float, y: float, *, anchor: str, ink: bool = False) -> None:
        """Write a text on a line of the canvas, in the page's own font; anchor: `start`, `middle` or `end`."""
        color = "ink" if ink else "soft"
        place = f'x="{x:.2f}" y="{self._top - y:.2f}" text-anchor="{anchor}"'
        self.texts.append(f'<text {place} style="fill: var(--{color})">{html.escape(text)}</text>')

    def under(self, x: float, text: str) -> None:
        """Write a text below a value of x."""
        self.words(text, self.x(x), self.BOTTOM - 15, anchor="middle")

    def beside(self, y: float, text: str, *, ink: bool = False) -> None:
        """Write a text to the left of a value of y."""
        self.words(text, self._left - 6, self.y(y) - 3.6, anchor="end", ink=ink)

    def name_x(self, text: str) -> None:
        """Write what x is, below its values on the right."""
        self.words(text, self._left + self._width, self.BOTTOM - 30, anchor="end")

    def name_y(self, text: str) -> None:
        """Write what y is, above its values."""
        self.words(text, self._left - 6, self.BOTTOM + self._height + 5, anchor="end")

    def _path(self, points: Sequence[tuple[float, float]], each: int, **style: Any) -> None:
        from matplotlib.patches import PathPatch  # noqa: PLC0415 - only drawing needs it
        from matplotlib.path import Path  # noqa: PLC0415 - only drawing needs it

        if points:
            codes = [Path.MOVETO if i % each == 0 else Path.LINETO for i in range(len(points))]
            self._add(PathPatch(Path([(self.x(x), self.y(y)) for x, y in points], codes), **style))

    def _add(self, artist: Any) -> None:
        from matplotlib.transforms import IdentityTransform  # noqa: PLC0415 - only drawing needs it

        artist.set_transform(IdentityTransform())
        self.figure.add_artist(artist)


def panel(name: str, draw: Callable[[Canvas], None], *, height: int = 220, left: int = 46, right: int = 14) -> str:
    """Return a drawing as the markup of an SVG without a size of its own.

    name: unique in the page, by which its parts are known from those of other drawings; left, right: margins.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - only drawing needs it

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, frameon=False)
    canvas = Canvas(figure, height, left, right)
    draw(canvas)
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = _inline(content.getvalue(), name)
    texts = "\n".join(canvas.texts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" aria-hidden="true">{drawn}\n{texts}\n</svg>'


def _inline(text: str, name: str) -> str:
    """Return what is in an SVG that matplotlib wrote, in the colors of the page and with references of its own."""
    text = _DROPPED.sub("", text[text.index("<svg") :])
    text = text[text.index(">") + 1 : text.rindex("</svg>")]
    text = _TAG.sub(lambda tag: _NUMBER.sub(r"\1", tag[0]), text)
    text = _PLACEHOLDER.sub(lambda match: _VARIABLE[match[0]], _GROUP_ID.sub(r"\1", text))
    return re.sub(r"\n\s*", "\n", _REFERENCE.sub(rf"\g<1>{name}-", text)).strip()
