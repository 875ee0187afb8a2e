"""A round's attempts: drawn, played into a journal chunk by chunk, sealed as one file.

What is in the journal is not played again, whoever played it; since tokens depend on an attempt's identity alone, a
round that was cut and one that was not end in the same file.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bcft.config.loader import Recipe
from bcft.environments.base import environment_factory
from bcft.environments.single_turn import SingleTurn
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.policy.loading import Policy
from bcft.rollout.episode import Attempt, play
from bcft.runs.clock import Clock
from bcft.runs.distributed import gather, rank, world_size
from bcft.runs.storage import Journal, read_journal, read_jsonl, seal, sealed, write_jsonl
from bcft.types import Environment, Problem, Sampling, Trajectory

CHUNK = 128
"""Trajectories written to the journal at once: what a kill can cost."""
FILE = "rollouts.jsonl"


def draw(recipe: Recipe, problems: Collection[Problem], number: int) -> list[Attempt]:
    """Return a round's attempts: problems drawn without replacement, all attempts at one side by side."""

    def lot(problem: Problem) -> bytes:
        return sha256(f"{recipe['seed']}-{number}-{problem.id}".encode()).digest()

    drawn = sorted(problems, key=lot)[: recipe["prompts_per_round"]]
    return [Attempt(problem, number, sample) for problem in drawn for sample in range(recipe["num_generations"])]


def roll_out(
    recipe: Recipe,
    policy: Policy,
    attempts: Sequence[Attempt],
    *,
    place: Path,
    clock: Clock,
    make: Callable[[], Environment] | None = None,
) -> list[Trajectory]:
    """Return the trajectories of a round's attempts, in their order: from its sealed file if there is one.

    make: an environment in the place of the recipe's.
    """
    if sealed(place, FILE):
        return [Trajectory.from_json(line) for line in read_jsonl(place / FILE)]
    found = play_some(recipe, policy, attempts, place=place, clock=clock, make=make)
    if rank() == 0:
        with clock.phase("other"):
            write_jsonl(place / FILE, (trajectory.to_json() for trajectory in found))
            seal(place, FILE)
    return found


def play_some(
    recipe: Recipe,
    policy: Policy,
    attempts: Sequence[Attempt],
    *,
    place: Path,
    clock: Clock,
    make: Callable[[], Environment] | None = None,
) -> list[Trajectory]:
    """Play this process's share of the attempts, each chunk journalled; return everybody's, in the attempts' order."""
    mine = Journal(place / "journal" / f"{rank():03d}.jsonl")
    lines = [line for file in sorted(mine.path.parent.glob("*.jsonl")) for line in read_journal(file)]
    known = {line["id"]: Trajectory.from_json(line) for line in lines}
    asked = {f"{a.round}-{a.problem.id}-{a.sample}": a for a in attempts}
    left = [a for a in share(attempts) if f"{a.round}-{a.problem.id}-{a.sample}" not in known]
    playing = played(
        policy,
        left,
        **turns_of(recipe, make),
        sampling=sampling_of(recipe),
        max_new_tokens=recipe["max_completion_length"],
        seed=recipe["seed"],
        phase="rollout",
        label="" if "quiet" in recipe.flags else "roll out",
    )
    for chunk in _chunks(playing):
        with clock.phase("other"):
            mine.append([trajectory.to_json() for trajectory in chunk])
        known |= {trajectory.id: trajectory for trajectory in chunk}
    with clock.phase("other"):
        found = gather([known[identity] for identity in asked if identity in known])
    everyone = {trajectory.id: trajectory for trajectory in found}
    return [everyone[identity] for identity in asked]


def _chunks(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    chunk: list[Trajectory] = []
    for trajectory in trajectories:
        chunk.append(trajectory)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def played(
    policy: Policy,
    attempts: Sequence[Attempt],
    make: Callable[[], Environment],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    max_turns: int,
    step_timeout: float,
    seed: int,
    phase: str,
    label: str,
) -> Iterator[Trajectory]:
    """Play attempts as `bcft.rollout.episode.play` does; yield trajectories as they finish.

    label: what the bar says, which shows attempts done, tokens a second and time left on a terminal; none without.
    """
    tokens, start = 0, time.perf_counter()
    watched = bool(label) and rank() == 0 and sys.stderr.isatty()
    engine = HFEngine(policy.model, pad_id=policy.renderer.tokenizer.pad_token_id)
    with (
        sampling_mode(policy.model, autocast=policy.precision.autocast),
        tqdm(total=len(attempts), desc=label, unit="attempt", disable=not watched, leave=False) as bar,
    ):
        for trajectory in play(
            attempts,
            make,
            policy.renderer,
            engine,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            max_turns=max_turns,
            step_timeout=step_timeout,
            seed=seed,
            phase=phase,
        ):
            tokens += sum(len(turn.action_ids) for turn in trajectory.turns)
            bar.update()
            if bar.n % 16 == 0:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            yield trajectory


def share(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return what this process plays: whole problems, whose attempts share a prefill."""
    problems = list(dict.fromkeys(attempt.problem.id for attempt in attempts))
    mine = set(problems[rank() :: world_size()])
    return [attempt for attempt in attempts if attempt.problem.id in mine]


def sampling_of(recipe: Recipe) -> Sampling:
    """Return how a recipe samples."""
    return Sampling(**{f.name: recipe[f.name] for f in dataclasses.fields(Sampling)})


def turns_of(recipe: Recipe, make: Callable[[], Environment] | None = None) -> dict[str, Any]:
    """Return `make, max_turns, step_timeout` of a recipe: one turn without an environment."""
    factory = make or environment_factory(recipe["environment"], recipe["environment_args"])
    turns = 1 if factory is SingleTurn else recipe["max_turns"]
    return {"make": factory, "max_turns": turns, "step_timeout": recipe["step_timeout"]}
