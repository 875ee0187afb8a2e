"""A run as a page: `python -m bcft.report DIR [DIR]` writes `report.html` into the first directory.

DIR is the output_dir of `sft` or `filtered`, or the `evaluate` directory below it; a second one is set beside it, with
the paired test on the same problems. Nothing but files is read, and torch is not loaded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bcft.cli import guarded
from bcft.errors import UsageError
from bcft.reporting.report import recorded_against, write_report
from bcft.reporting.tables import say

USAGE = """usage: bcft report DIR [DIR]
       (or python -m bcft.report)

Draw a run directory again as one self-contained HTML page, DIR/report.html: of sft, of filtered, or of evaluate
(DIR/evaluate). A second directory is set beside the first, with the paired test on the same problems.

example: bcft report runs/filtered_bc runs/filtered_bc-control

flags:
  --debug               show the traceback of an error"""


def run(directory: str | Path, against: str | Path | None = None) -> Path:
    """Draw the page of a run, and another run beside it; return the path of `report.html`.

    against: by default the run that the recipe of a filtered run names. Raises a `bcft.errors.BcftError`.
    """
    path = Path(directory)
    other = Path(against) if against is not None else recorded_against(path)
    return write_report(path, against=other)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0

    def draw() -> None:
        unknown = [word for word in arguments if word.startswith("-") and word != "--debug"]
        directories = [word for word in arguments if not word.startswith("-")]
        if unknown:
            raise UsageError(f"command line: {unknown[0]}: not a flag of bcft report; it takes DIR [DIR]")
        if not 1 <= len(directories) <= 2:
            raise UsageError(f"command line: bcft report takes one directory or two, not {len(directories)}")
        say(f"Report: {run(*directories)}", quiet=False)

    return guarded(draw, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
