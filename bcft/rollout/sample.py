"""A round's attempts: drawn, played into a journal chunk by chunk, sealed as one file.

An attempt in the journal is not played again, whichever process played it, unless its environment failed. Tokens
depend on an attempt's identity alone, so an interrupted round ends in the same file as an uninterrupted one.
"""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tqdm.auto import tqdm

from bcft.generation import make_engine
from bcft.policy.loading import Policy
from bcft.rollout.episode import Attempt, play
from bcft.rollout.failures import refuse_failures
from bcft.runs.clock import Clock
from bcft.runs.distributed import gather, rank, world_size
from bcft.runs.storage import ROLLOUTS, Journal, read_journal, read_jsonl, seal, sealed, write_jsonl
from bcft.types import Problem, RolloutSettings, Trajectory

CHUNK = 128
"""Trajectories written to the journal at once. A kill costs those not written yet: fewer than these have ended, and all
others are still being played."""


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

    phase: `rollout`, `dev` or `test`, part of the noise's key; attempts of two phases need directories of their own.
    Attempts whose environment failed are played again. Returns the trajectories of all processes, in the order of the
    attempts.
    """
    journal = Journal(directory / "journal" / f"{rank():03d}.jsonl")
    lines = [line for file in sorted(journal.path.parent.glob("*.jsonl")) for line in read_journal(file)]
    known = {line["id"]: Trajectory.from_json(line) for line in lines if line["ended"] != "error"}
    missing = [attempt for attempt in share(attempts) if attempt.id not in known]
    for chunk in _chunks(play_attempts(policy, missing, settings, phase=phase, label=label)):
        with clock.phase("other"):
            journal.append([trajectory.to_json() for trajectory in chunk])
        known |= {trajectory.id: trajectory for trajectory in chunk}
    with clock.phase("other"):
        gathered = gather([known[attempt.id] for attempt in attempts if attempt.id in known])
    everyone = {trajectory.id: trajectory for trajectory in gathered}
    return [everyone[attempt.id] for attempt in attempts]


def play_attempts(
    policy: Policy, attempts: Sequence[Attempt], settings: RolloutSettings, *, phase: str, label: str
) -> Iterator[Trajectory]:
    """Play attempts with the policy's engine; yield trajectories as they finish.

    phase: `rollout`, `dev` or `test`, part of the noise's key; label: of the progress bar; '' for none.
    """
    with make_engine(policy, settings) as engine:
        trajectories = play(attempts, settings, policy.renderer, engine, phase=phase)
        yield from _with_progress(trajectories, total=len(attempts), label=label)


def _with_progress(trajectories: Iterable[Trajectory], *, total: int, label: str) -> Iterator[Trajectory]:
    """Pass trajectories on; on a terminal, show attempts done, tokens a second and time left."""
    tokens, start = 0, time.perf_counter()
    shown = bool(label) and rank() == 0 and sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit="attempt", disable=not shown, leave=False) as bar:
        for trajectory in trajectories:
            tokens += sum(len(turn.action_ids) for turn in trajectory.turns)
            bar.update()
            if bar.n % 16 == 0:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            yield trajectory


def _chunks(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    chunk: list[Trajectory] = []
    for trajectory in trajectories:
        chunk.append(trajectory)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
