"""A round's attempts: drawn, played into a journal chunk by chunk, sealed as one file.

What is in the journal is not played again, whoever played it; since tokens depend on an attempt's identity alone, a
round that was cut and one that was not end in the same file.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from bcft.clock import Clock
from bcft.config import Recipe
from bcft.data import Splits
from bcft.evaluation import sampling_of, turns_of
from bcft.journal import Journal, read_journal, read_jsonl, seal, sealed, write_jsonl
from bcft.model import Policy, longest_row
from bcft.play import Attempt
from bcft.playing import gather, played, share
from bcft.processes import rank
from bcft.rendering import Renderer
from bcft.rows import make_rows
from bcft.transcripts import demonstration_line
from bcft.types import Environment, Problem, Trajectory

CHUNK = 128
"""Trajectories written to the journal at once: what a kill can cost."""
FILE = "rollouts.jsonl"


def draw(recipe: Recipe, problems: Collection[Problem], number: int) -> list[Attempt]:
    """Return a round's attempts: problems drawn without replacement, all attempts at one side by side."""

    def lot(problem: Problem) -> bytes:
        return sha256(f"{recipe['seed']}-{number}-{problem.id}".encode()).digest()

    drawn = sorted(problems, key=lot)[: recipe["prompts_per_round"]]
    return [Attempt(problem, number, sample) for problem in drawn for sample in range(recipe["num_generations"])]


def replay_lines(recipe: Recipe, splits: Splits, renderer: Renderer) -> list[dict[str, Any]]:
    """Return the rows of `replay_dataset` as `kept.jsonl` holds them; none without the key.

    Raises DataError where the dataset cannot be trained on.
    """
    demonstrations = {d.problem.where: d for d in splits.replay}
    if not demonstrations:
        return []
    limit = longest_row(recipe)
    rows, _ = make_rows(list(demonstrations.values()), renderer, max_length=limit, train_on=recipe["train_on"])
    return [demonstration_line(demonstrations[row.where], row, number) for number, row in enumerate(rows)]


def draw_replay(recipe: Recipe, lines: Sequence[dict[str, Any]], number: int, *, most: int) -> list[dict[str, Any]]:
    """Return a round's share of the rows to replay: at most so many, other ones each round."""

    def lot(line: dict[str, Any]) -> bytes:
        return sha256(f"{recipe['seed']}-{number}-{line['id']}".encode()).digest()

    return sorted(lines, key=lot)[:most]


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
        found = gather(policy, [known[identity] for identity in asked if identity in known])
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
