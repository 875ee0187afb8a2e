"""A round's attempts: drawn, played into a journal chunk by chunk, sealed as one file.

An attempt in the journal is not played again, whichever process played it, unless its environment failed. Tokens
depend on an attempt's identity alone, so an interrupted round ends in the same file as an uninterrupted one.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from bcft.errors import FaultError, MismatchError, ServerError, UsageError
from bcft.generation import make_engine
from bcft.policy.loading import Policy
from bcft.rollout.episode import Attempt, play
from bcft.rollout.failures import refuse_failures
from bcft.runs.clock import Clock
from bcft.runs.distributed import gather, rank, world_size
from bcft.runs.progress import Progress
from bcft.runs.storage import ROLLOUTS, Journal, read_journal, read_jsonl, seal, sealed, storage, write_jsonl
from bcft.types import Action, Engine, Problem, Request, RolloutSettings, Trajectory

CHUNK = 128
"""Trajectories written to the journal at once. A kill costs those not written yet: fewer than these have ended, and all
others are still being played. Those of a server, which may be paid for, are written one by one."""


def draw(problems: Collection[Problem], number: int, *, seed: int, prompts: int, samples: int) -> list[Attempt]:
    """Return the attempts of a round: `prompts` problems drawn without replacement, `samples` attempts at each.

    number: of the round. All attempts at a problem are adjacent.
    """

    def draw_key(problem: Problem) -> bytes:
        return sha256(f"{seed}-{number}-{problem.id}".encode()).digest()

    drawn = sorted(problems, key=draw_key)[:prompts]
    return [Attempt(problem, number, sample) for problem in drawn for sample in range(samples)]


def share(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that this process plays: whole problems, whose attempts share a prefill."""
    problems = list(dict.fromkeys(attempt.problem.id for attempt in attempts))
    mine = set(problems[rank() :: world_size()])
    return [attempt for attempt in attempts if attempt.problem.id in mine]


def roll_out(
    policy: Policy,
    attempts: Sequence[Attempt],
    settings: RolloutSettings,
    *,
    directory: Path,
    clock: Clock,
    label: str,
) -> list[Trajectory]:
    """Return the trajectories of a round's attempts, in their order: from its sealed file if there is one.

    label: of the progress; '' for none.

    Raises FaultError, and seals nothing, when too many environments failed: the same command plays those again.
    """
    if sealed(directory, ROLLOUTS):
        return [Trajectory.from_json(line) for line in read_jsonl(directory / ROLLOUTS)]
    trajectories = play_journaled(policy, attempts, settings, directory=directory, clock=clock, label=label)
    refuse_failures(trajectories)
    if rank() == 0:
        with clock.phase("other"):
            write_jsonl(directory / ROLLOUTS, (trajectory.to_json() for trajectory in trajectories))
            seal(directory, ROLLOUTS)
    return trajectories


def journal_path(directory: Path) -> Path:
    """Return where this process keeps the attempts that it has played."""
    return directory / "journal" / f"{rank():03d}.jsonl"


def play_journaled(
    policy: Policy,
    attempts: Sequence[Attempt],
    settings: RolloutSettings,
    *,
    directory: Path,
    clock: Clock,
    label: str,
    phase: str = "rollout",
) -> list[Trajectory]:
    """Play this process's share of the attempts, each chunk written to its journal below the directory.

    label: of the progress; '' for none. phase: `rollout`, `dev` or `test`, part of the noise's key; attempts of two
    phases need directories of their own. Attempts whose environment failed are played again. Returns the trajectories
    of all processes, in the order of the attempts.

    Raises what one process raised about its engine on all of them; after a MismatchError none of the attempts counts.
    """
    journal = Journal(journal_path(directory))
    lines = [line for file in sorted(journal.path.parent.glob("*.jsonl")) for line in read_journal(file)]
    known = {line["id"]: Trajectory.from_json(line) for line in lines if line["ended"] != "error"}
    missing = [attempt for attempt in share(attempts) if attempt.id not in known]
    shown = f"{label} (process 1 of {world_size()})" if label and world_size() > 1 else label
    failed: FaultError | ServerError | UsageError | None = None
    try:
        with Progress(shown, summary=phase == "test") as progress:
            played = play_attempts(policy, missing, settings, phase=phase, progress=progress)
            for chunk in _chunks(played, CHUNK if settings.make_engine is None else 1):
                with clock.phase("other"):
                    journal.append([trajectory.to_json() for trajectory in chunk])
                known |= {trajectory.id: trajectory for trajectory in chunk}
    except (FaultError, ServerError, UsageError) as error:
        failed = error  # for the other processes, which would wait for this one
    with Progress(label and f"{label}, wait for the other processes"), clock.phase("other"):
        _raise_together(failed, journal.path.parent)
        gathered = gather([known[attempt.id] for attempt in attempts if attempt.id in known])
    everyone = {trajectory.id: trajectory for trajectory in gathered}
    return [everyone[attempt.id] for attempt in attempts]


def _raise_together(failed: FaultError | ServerError | UsageError | None, journals: Path) -> None:
    """Raise what any process failed with; after a MismatchError remove the journals of all of them first."""
    failures = [error for error in gather([failed]) if error is not None]
    mismatch = next((error for error in failures if isinstance(error, MismatchError)), None)
    if mismatch is not None and rank() == 0:
        with storage(journals):
            for file in journals.glob("*.jsonl"):
                file.unlink()
    if failures:
        raise mismatch or failures[0]


def play_attempts(
    policy: Policy, attempts: Sequence[Attempt], settings: RolloutSettings, *, phase: str, progress: Progress
) -> Iterator[Trajectory]:
    """Play attempts with the policy's engine; yield trajectories as they finish.

    phase: `rollout`, `dev` or `test`, part of the noise's key; progress: counts attempts and their tokens.
    """
    if attempts:
        progress.count(len(attempts), "attempts")
    with make_engine(policy, settings) as engine:
        part = 1 / (max(len(attempts), 1) * settings.max_turns)  # of the work, if every attempt takes all its turns
        counted = _Counted(engine, progress, part)
        several = settings.at_once if settings.at_once and settings.max_turns > 1 else max(len(attempts), 1)
        for first in range(0, len(attempts), several):
            together = attempts[first : first + several]
            for trajectory in play(together, settings, policy.renderer, counted, phase=phase):
                progress.advance(share=part * (settings.max_turns - len(trajectory.turns)))
                yield trajectory


@dataclass(frozen=True)
class _Counted:
    """An engine whose actions are counted as they finish: attempts of many turns all end late."""

    engine: Engine
    progress: Progress
    part: float
    """Of the work, that is one action."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        for action in self.engine.generate(requests):
            self.progress.advance(0, tokens=len(action.ids), share=self.part)
            yield action


def _chunks(trajectories: Iterable[Trajectory], size: int) -> Iterator[list[Trajectory]]:
    chunk: list[Trajectory] = []
    for trajectory in trajectories:
        chunk.append(trajectory)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
