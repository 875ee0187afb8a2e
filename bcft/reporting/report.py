"""`report.html`: one page about a run of `filtered`, `sft` or `evaluate`, made from the files in its directory alone.

The same files give the same bytes, so the page can be drawn again at any time, of an unfinished run as well. Left out:
figures that are not in the files yet, except the paired comparison of two runs.
"""

import time
from collections.abc import Callable
from pathlib import Path

from bcft.errors import StorageError, UsageError
from bcft.reporting.page.cloned import cloned_page
from bcft.reporting.page.filtered import filtered_page
from bcft.reporting.page.html import render
from bcft.reporting.page.measured import beside, measured_page
from bcft.reporting.page.parts import Page
from bcft.reporting.page.svg import drawing
from bcft.reporting.run_files import AnyRun, ClonedFiles, RunFiles, read_run
from bcft.runs.storage import write_text

REPORT = "report.html"
EVERY = 30.0
"""Seconds between two drawings of a run at work."""


def check_against(directory: Path) -> None:
    """Raise UsageError unless the directory is that of a filtered run, which may be unfinished."""
    RunFiles.read(directory)


def write_report(directory: Path, *, against: Path | None = None) -> Path:
    """Write `report.html` into a run's directory; return its path.

    against: another run to set beside it, typically its random control. Either run may be unfinished. Raises
    StorageError, and UsageError when either is damaged or no such run.
    """
    run, other = read_run(directory), read_run(against) if against else None
    with drawing():
        text = render(_page(run, other))
    write_text(directory / REPORT, text)
    return directory / REPORT


class Redraw:
    """Draws the page of a run at work again, unless it was drawn less than `EVERY` seconds ago.

    A page that cannot be drawn costs the run nothing: `say` gets one line about it.
    """

    def __init__(self, directory: Path, *, against: Path | None, say: Callable[[str], None]) -> None:
        self.directory, self.against, self.say = directory, against, say
        self._drawn = time.monotonic()

    def __call__(self) -> None:
        """Draw, if it is due."""
        if time.monotonic() - self._drawn < EVERY:
            return
        try:
            write_report(self.directory, against=self.against)
        except (UsageError, StorageError, OSError) as error:
            self.say(f"{REPORT} is not drawn: {error}")
        self._drawn = time.monotonic()


def recorded_against(directory: Path) -> Path | None:
    """Return the run that a run was compared with by its recipe's key `against`; None if there is none any more."""
    run = read_run(directory)
    named = run.config.get("against") if isinstance(run, RunFiles) else None
    return Path(named) if named and (Path(named) / "config.yaml").is_file() else None


def _page(run: AnyRun, other: AnyRun | None) -> Page:
    more = beside(run, other) if other else []
    if isinstance(run, RunFiles):
        return filtered_page(run, other if isinstance(other, RunFiles) else None, more)
    return cloned_page(run, more) if isinstance(run, ClonedFiles) else measured_page(run, more)
