"""The embedded problems `bcft:grid-walk`: from a start to a goal on a grid, one step at a time.

The walker reads how far the goal is (`2E 1N`: two steps east, one north) and answers with a direction (`N`). A step off
the grid does not move it. Nothing is hidden and nothing is random, so better steps make a shorter walk: the return
reflects skill, unlike that of `guess_number`.

The demonstrations come from a sloppy walker: at every step it goes in any direction with probability `SLOPPY`, else
towards the goal.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import count
from typing import TypedDict

from bcft.environments.base import SHARES, EmbeddedDataset, Split, uniforms
from bcft.types import Feedback, Message, Problem, Prompt, bucket, problem_id

SIZE = 6
"""Cells on each side of the grid."""
SLOPPY = 0.7
LONGEST = 40
"""Steps of the longest demonstration; a longer walk is drawn again."""
STEPS = {"N": (0, 1), "E": (1, 0), "S": (0, -1), "W": (-1, 0)}
Cell = tuple[int, int]
"""Column from the west and row from the south, from 0."""


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    messages: list[Message]
    start: list[int]
    goal: list[int]


# Rules
def offset(at: Cell, goal: Cell) -> str:
    """Return how far the goal is, as the walker reads it: `2E 1N`; `here` at the goal.

    >>> offset((0, 3), (2, 3))
    '2E'
    """
    east, north = goal[0] - at[0], goal[1] - at[1]
    parts = [f"{abs(n)}{words[n < 0]}" for n, words in ((east, "EW"), (north, "NS")) if n]
    return " ".join(parts) or "here"


def step(at: Cell, direction: str) -> Cell:
    """Return the cell that a step leads to: the same cell at the edge of the grid, and for text without a direction.

    A direction is a letter of `NESW` or a word that begins with it, in any case.
    """
    east, north = STEPS.get(direction.strip()[:1].upper(), (0, 0))
    there = at[0] + east, at[1] + north
    return there if all(0 <= coordinate < SIZE for coordinate in there) else at


def shortest(start: Cell, goal: Cell) -> int:
    """Return the least number of steps."""
    return abs(goal[0] - start[0]) + abs(goal[1] - start[1])


# Problems
def prompt(start: Cell, goal: Cell) -> str:
    """Return the problem's text, which makes its id; the walker reads offsets only."""
    return f"Walk from {start[0]},{start[1]} to {goal[0]},{goal[1]} on a grid of {SIZE} x {SIZE}."


def _pairs(split: Split, seed: int) -> list[tuple[Cell, Cell]]:
    """Return the split's pairs of start and goal in an order drawn from the seed."""
    low, high = SHARES[split]
    cells = [(column, row) for column in range(SIZE) for row in range(SIZE)]
    pairs = [
        (start, goal)
        for start in cells
        for goal in cells
        if start != goal and low <= bucket(problem_id(prompt(start, goal))) < high
    ]
    return sorted(pairs, key=lambda pair: sha256(f"{seed}-{pair}".encode()).digest())


# Demonstrations
def items(split: Split, n: int, *, seed: int = 0) -> list[Item]:
    """Return n walks, of which any fewer are the first: all pairs of the split once, then other walks of the same.

    Of 1,260 pairs of start and goal some 5 % each are held out as test and dev.
    """
    pairs = _pairs(split, seed)
    return [_item(*pairs[index % len(pairs)], seed, index // len(pairs)) for index in range(n)]


def _item(start: Cell, goal: Cell, seed: int, copy: int) -> Item:
    text = prompt(start, goal)
    walks = (_walk(start, goal, f"{seed}-{copy}-{attempt}-{text}") for attempt in count())
    walk = next(walk for walk in walks if walk)
    conversation: list[Message] = []
    at = start
    for direction in walk:
        conversation += [{"role": "user", "content": offset(at, goal)}, {"role": "assistant", "content": direction}]
        at = step(at, direction)
    return Item(prompt=text, messages=conversation, start=list(start), goal=list(goal))


def _walk(start: Cell, goal: Cell, key: str) -> Sequence[str]:
    """Return the sloppy walker's steps; none when there are too many."""
    numbers = uniforms(key)
    at = start
    walk: list[str] = []
    while at != goal:
        if len(walk) == LONGEST:
            return []
        towards = [d for d in STEPS if shortest(step(at, d), goal) < shortest(at, goal)]
        choices = list(STEPS) if next(numbers) < SLOPPY else towards
        walk.append(choices[int(next(numbers) * len(choices))])
        at = step(at, walk[-1])
    return walk


# Environment
class GridWalk:
    """Shows how far the goal is, takes `N`, `E`, `S` or `W`, and is done at the goal.

    Reward is -1.0 for each step, so the return is minus the number of steps. Text without a direction is a step on the
    spot. Problems are those of `bcft:grid-walk`, with the columns `start` and `goal`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is random
        """Return the offset of the goal from the start."""
        self.at, self.goal = _cell(problem.columns["start"]), _cell(problem.columns["goal"])
        return offset(self.at, self.goal)

    def step(self, action: str) -> Feedback:
        """Walk a step; return the new offset."""
        self.at = step(self.at, action)
        there = self.at == self.goal
        return Feedback(observation=offset(self.at, self.goal), reward=-1.0, done=there, success=there)


def _cell(coordinates: list[int]) -> Cell:
    column, row = coordinates
    return column, row


DATASETS = {"bcft:grid-walk": EmbeddedDataset(items)}
