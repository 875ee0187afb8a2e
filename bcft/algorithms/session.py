"""A command at work in its run directory: opened, resumed, reported."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.config.declare import TRAINING
from bcft.config.loader import Config
from bcft.data.loading import Splits
from bcft.reporting.sharing import check_push, missing, push, write_card
from bcft.reporting.tables import say
from bcft.runs.directory import RunDirectory, open_run
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import read_json


@dataclass(frozen=True)
class Session:
    """The directory that this process holds, and whether it prints anything but the conclusion."""

    directory: RunDirectory
    quiet: bool

    @property
    def path(self) -> Path:
        """Where the run's files are."""
        return self.directory.path

    def say(self, text: str) -> None:
        """Print a line on rank 0, unless quiet."""
        say(text, quiet=self.quiet)

    def label(self, phase: str) -> str:
        """Return the label of a phase's progress: '' when quiet."""
        return "" if self.quiet else phase


def run_or_report(
    config: Config,
    splits: Splits,
    work: Callable[[Session], dict[str, Any]],
    *,
    report: Callable[[Path], Path] | None = None,
) -> dict[str, Any]:
    """Do the work in the run's directory; if the run is finished, print its saved conclusion. Return `metrics.json`.

    work: resumes an unfinished run by itself. report: writes a page about a finished directory, on rank 0.

    More rounds prolong a finished run.

    Raises UsageError when the directory was started with another recipe or other data; with other versions of packages
    or another number of processes too, unless it is finished and not prolonged.
    """
    with open_run(
        Path(config.training.output_dir),
        command=config.command,
        recipe=config.resolved,
        writes=rank() == 0,
        allow_drift="allow-drift" in config.flags,
        debug="debug" in config.flags,
    ) as directory:
        session = Session(directory, config.quiet)
        directory.check_recipe()
        directory.check_data(splits.digest)
        over = directory.finished and not directory.prolonged
        if rank() == 0:
            check_push(config.sharing, config.model, directory.path, finished=over)
        # Around all phases, so that what is between two of them is not silent either.
        with Progress(session.label(f"{config.command}, other work"), around=True):
            if over:
                metrics = read_json(directory.path / "metrics.json")
                session.say(f"{directory.path} is finished")
            else:
                with Progress(session.label("loading torch")):
                    directory.check_versions()
                metrics = work(session)
        try:
            if report and rank() == 0:
                with Progress(session.label("writing the report")):
                    page = report(directory.path)
                session.say(f"Report with the learning curve: {page}")
            if config.command in TRAINING and rank() == 0:
                _share(config, session, worked=not over)
        finally:  # the run is finished, whatever becomes of its report
            say(metrics["conclusion"], quiet=False)
    return metrics


def _share(config: Config, session: Session, *, worked: bool) -> None:
    """Write the card of a finished run's model, and upload what the recipe asks for and the Hub does not have.

    worked: the run was finished now, rather than before.
    """
    named = config.evaluation.against if config.command == "filtered" else None
    against = Path(named) if named else None
    write_card(session.path, against=against, anew=worked)
    if missing(config.sharing, session.path):
        session.directory.write_status("running")  # also of a run that was finished before: how it ends is written
    # On a terminal the Hub's own library shows how much is uploaded.
    with Progress("" if sys.stderr.isatty() else session.label("uploading")):
        for line in push(config.sharing, session.path, command_line=config.command_line, against=against):
            session.say(line)
