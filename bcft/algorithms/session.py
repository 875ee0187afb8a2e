"""A command at work in its run directory: opened, resumed, reported."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bcft.config.declare import TRAINING
from bcft.config.loader import Config
from bcft.data.loading import Splits
from bcft.reporting.report import write_report
from bcft.reporting.sharing import check_push, missing, push, write_card
from bcft.reporting.tables import say
from bcft.reporting.trackers import Trackers
from bcft.runs.directory import RunDirectory, open_run
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import read_json


@dataclass(frozen=True)
class Session:
    """The directory that this process holds, and whether it prints anything but the conclusion."""

    directory: RunDirectory
    quiet: bool
    trackers: Trackers

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
    against: Path | None = None,
) -> dict[str, Any]:
    """Do the work in the run's directory; if the run is finished, print its saved conclusion. Return `metrics.json`.

    work: resumes an unfinished run by itself. against: another run, to set beside this one in its report.

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
        command_line=config.command_line,
    ) as directory:
        session = Session(directory, config.quiet, _trackers(config, directory.path))
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
        session.trackers.conclude(metrics)
        try:
            if config.command in TRAINING and rank() == 0:
                with Progress(session.label("writing the report")):
                    page = write_report(directory.path, against=against)
                session.say(f"Report: {page}")
                _share(config, session, worked=not over)
        finally:  # the run is finished, whatever becomes of its report
            say(metrics["conclusion"], quiet=False)
    return metrics


def _trackers(config: Config, directory: Path) -> Trackers:
    """Return the trackers of a run: none but on rank 0."""
    return Trackers(
        config.training,
        directory,
        recipe=config.resolved,
        warn=partial(say, quiet=False),
        active=rank() == 0,
    )


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
