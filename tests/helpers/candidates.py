"""Candidates of the filter, and what tests of it ask about a selection."""

from typing import Any

from bcft.selection.filter import Candidate, Selection


def candidate(reward: float, success: str = "unknown", **others: Any) -> Candidate:
    """Make a trajectory of a problem of its own with nothing wrong; others: fields that differ."""
    identity = others.pop("id", "only")
    fields = {"problem_id": identity, "graded": True, "status": "done", "digest": identity, "round": 1} | others
    return Candidate(id=identity, reward=reward, success=success, **fields)


def of_rewards(rewards: list[float], success: str = "unknown", **others: Any) -> list[Candidate]:
    return [candidate(reward, success, id=f"{i:05}", **others) for i, reward in enumerate(rewards)]


def binary(wins: int, n: int, *, known: bool) -> list[Candidate]:
    """Make n trajectories with 0/1 rewards, wins first, whose success is known or not."""
    won, lost = ("yes", "no") if known else ("unknown", "unknown")
    return [candidate(float(i < wins), won if i < wins else lost, id=f"{i:05}") for i in range(n)]


def of_levels(levels: dict[float, int]) -> list[Candidate]:
    return of_rewards([reward for reward, n in levels.items() for _ in range(n)])


def kept_of(scope: list[Candidate], selection: Selection) -> list[Candidate]:
    return [c for c in scope if selection.decisions[c.id] == "kept"]
