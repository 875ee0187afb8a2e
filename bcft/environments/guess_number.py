"""Guess a hidden number: every guess costs 1, and luck shortens a game as skill does."""

from bcft.problems.guess_number import answer, bounds
from bcft.types import Feedback, Problem, Prompt


class GuessNumber:
    """Shows two bounds, answers each guess with `higher` or `lower`, and is done when it is `correct`.

    Reward is -1.0 a guess, so that the return is minus the guesses. What is no number counts as one. Problems are those
    of `bcft:guess-number`, with the columns `low`, `high` and `secret`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is drawn
        """Return the bounds."""
        self.secret = int(problem.columns["secret"])
        return bounds(problem.columns["low"], problem.columns["high"])

    def step(self, action: str) -> Feedback:
        """Answer a guess."""
        said = answer(self.secret, action)
        found = said == "correct"
        return Feedback(observation=said, reward=-1.0, done=found, success=found)
