"""Drawings by matplotlib as inline SVG: colors are those of the page's style sheet, so that they follow its theme.

Every color of a drawing has a placeholder, which becomes a variable of the style sheet. The same numbers give the same
bytes, whatever the user's own matplotlibrc says.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_HEAD = re.compile(r"^.*?<svg[^>]*>", re.DOTALL)
_DROPPED = re.compile(
    r"<metadata>.*?</metadata>\s*|<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*|<!--.*?-->\s*"
    r"|font-family: [^;\"]*; |font-style: [^;\"]*; | transform=\"rotate\(-0 [^\"]*\"",
    re.DOTALL,
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
                "svg.fonttype": "none",
                "svg.hashsalt": "bcft",
                "text.parse_math": False,
                "text.color": COLOR["soft"],
                "font.size": 10.5,
                "lines.solid_capstyle": "round",
            }
        )
        yield


def panel(name: str, draw: "Callable[[Axes], None]", *, height: int = 220, left: int = 46, right: int = 14) -> str:
    """Return a drawing as the markup of an SVG without a size of its own.

    name: unique in the page, by which its parts are known from those of other drawings; left, right: margins. The axes
    have no ticks of their own, which take most of the time of a drawing: `ticks` draws them.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - only drawing needs it

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, frameon=False)
    axes = figure.add_axes((left / WIDTH, 34 / height, 1 - (left + right) / WIDTH, 1 - 46 / height))
    axes.set_axis_off()
    draw(axes)
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(content.getvalue(), name, height)


def _inline(text: str, name: str, height: int) -> str:
    text = _DROPPED.sub("", _HEAD.sub("", text, count=1))
    text = _TAG.sub(lambda tag: _NUMBER.sub(r"\1", tag[0]), text)  # places, not what is written
    text = _PLACEHOLDER.sub(lambda match: _VARIABLE[match[0]], _GROUP_ID.sub(r"\1", text))
    text = re.sub(r"\n\s*", "\n", _REFERENCE.sub(rf"\g<1>{name}-", text))
    return f'<svg viewBox="0 0 {WIDTH} {height}" aria-hidden="true">{text}'.rstrip()
