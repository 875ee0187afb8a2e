"""A round's attempts: drawn, played into a journal chunk by chunk, sealed as one file.

What is in the journal is not played again, whoever played it; since tokens depend on an attempt's identity alone, a
round that was cut and one that was not end in the same file.
"""

import dataclasses
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tqdm.auto import tqdm

from bcft.clock import Clock
from bcft.config import Recipe
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation import gather
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.journal import Journal, read_journal, read_jsonl, seal, sealed, write_jsonl
from bcft.model import Policy
from bcft.play import Attempt, play
from bcft.processes import rank, world_size
from bcft.types import Problem, Sampling, Trajectory

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
    recipe: Recipe, policy: Policy, attempts: Sequence[Attempt], *, place: Path, clock: Clock
) -> list[Trajectory]:
    """Return the trajectories of a round's attempts, in their order: from its sealed file if there is one."""
    if sealed(place, FILE):
        return [Trajectory.from_json(line) for line in read_jsonl(place / FILE)]
    played = play_some(recipe, policy, attempts, place=place, clock=clock)
    if rank() == 0:
        with clock.phase("other"):
            write_jsonl(place / FILE, (trajectory.to_json() for trajectory in played))
            seal(place, FILE)
    return played


def play_some(
    recipe: Recipe, policy: Policy, attempts: Sequence[Attempt], *, place: Path, clock: Clock
) -> list[Trajectory]:
    """Play this process's share of the attempts, each chunk journalled; return everybody's, in the attempts' order."""
    mine = Journal(place / "journal" / f"{rank():03d}.jsonl")
    lines = [line for file in sorted(mine.path.parent.glob("*.jsonl")) for line in read_journal(file)]
    known = {line["id"]: Trajectory.from_json(line) for line in lines}
    asked = {f"{a.round}-{a.problem.id}-{a.sample}": a for a in attempts}
    problems = list(dict.fromkeys(a.problem.id for a in attempts))
    share = set(problems[rank() :: world_size()])  # whole problems, whose attempts share a prefill
    left = [a for identity, a in asked.items() if identity not in known and a.problem.id in share]
    for chunk in _chunks(_played(recipe, policy, left)):
        with clock.phase("other"):
            mine.append([trajectory.to_json() for trajectory in chunk])
        known |= {trajectory.id: trajectory for trajectory in chunk}
    with clock.phase("other"):
        found = gather(policy, [known[identity] for identity in asked if identity in known])
    everyone = {trajectory.id: trajectory for trajectory in found}
    return [everyone[identity] for identity in asked]


def _played(recipe: Recipe, policy: Policy, attempts: Sequence[Attempt]) -> Iterator[Trajectory]:
    """Play attempts, showing how many are done, tokens a second and time left to whoever watches a terminal."""
    watched = rank() == 0 and sys.stderr.isatty() and "quiet" not in recipe.flags
    tokens, start = 0, time.perf_counter()
    with (
        sampling_mode(policy.model, autocast=policy.precision.autocast),
        tqdm(total=len(attempts), desc="roll out", unit="attempt", disable=not watched, leave=False) as bar,
    ):
        for trajectory in play(
            attempts,
            SingleTurn,
            policy.renderer,
            HFEngine(policy.model, pad_id=policy.renderer.tokenizer.pad_token_id),
            sampling=Sampling(**{f.name: recipe[f.name] for f in dataclasses.fields(Sampling)}),
            max_new_tokens=recipe["max_completion_length"],
            max_turns=1,
            step_timeout=60.0,
            seed=recipe["seed"],
            phase="rollout",
        ):
            tokens += sum(len(turn.action_ids) for turn in trajectory.turns)
            bar.update()
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            yield trajectory


def _chunks(played: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    chunk: list[Trajectory] = []
    for trajectory in played:
        chunk.append(trajectory)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
