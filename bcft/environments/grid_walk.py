"""Walk to a goal on a grid: every step costs 1, nothing is hidden, nothing is drawn."""

from bcft.problems.grid_walk import Cell, offset, step
from bcft.types import Feedback, Problem, Prompt


class GridWalk:
    """Tells how far the goal is, takes `N`, `E`, `S` or `W`, and is done at the goal.

    Reward is -1.0 a step, so that the return is minus the steps walked. What is no direction is a step on the spot.
    Problems are those of `bcft:grid-walk`, with the columns `start` and `goal`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is drawn
        """Return the offset of the goal from the start."""
        self.at, self.goal = _cell(problem.columns["start"]), _cell(problem.columns["goal"])
        return offset(self.at, self.goal)

    def step(self, action: str) -> Feedback:
        """Walk a step; return the new offset."""
        self.at = step(self.at, action)
        there = self.at == self.goal
        return Feedback(observation=offset(self.at, self.goal), reward=-1.0, done=there, success=there)


def _cell(place: list[int]) -> Cell:
    column, row = place
    return column, row
