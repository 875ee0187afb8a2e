"""A page as HTML: one file that asks for nothing else, and that nothing in it can make act."""

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bcft.reporting.page.parts import Page

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def render(page: Page) -> str:
    """Return a page as HTML. The same page gives the same bytes.

    All texts are escaped. The policy in the head allows the page's own script and no request, so that what slipped
    through would not act either.
    """
    from markupsafe import Markup  # noqa: PLC0415 - only drawing needs it

    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _template().render(
        page=page,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup(digest),
        safe=Markup,
    )
    return _UNSEEN.sub("\ufffd", text)


@functools.cache
def _template() -> "jinja2.Template":
    """Return the template; it is compiled once."""
    import jinja2  # noqa: PLC0415 - only drawing needs it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
